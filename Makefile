# Each target is complete on a fresh machine: it makes the virtual environment first if there is none.
#   make setup    .venv with everything (idempotent)
#   make demo     the main job on the embedded corpus, or on DATA=folder: corpus, labels, pre-training, evaluation, export
#   make test     all tests but the slow ones, which are make test-slow
#   make check    format, lint, types, import contracts, the house, tests, and a real train.py run
#   make bench    one JSON line a figure

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.set-up
# constraints.txt is one exact, tested set for Python 3.11; other versions resolve within requirements.txt.
CONSTRAINTS := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')
# libtpu is there for its compiler; without this line JAX would look for a TPU, loudly. JAX_PLATFORMS=cuda make demo takes a GPU.
export JAX_PLATFORMS ?= cpu
# On Linux with glibc 2.35 or newer, large arrays come in pages of 2 MB: a fifth faster steps (docs/performance.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
DATA ?=
RUN ?= runs/demo

.PHONY: setup demo test test-slow check format bench smoke

setup: $(STAMP)

$(STAMP): requirements.txt requirements-test.txt constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -r requirements-test.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --editable .
	touch $(STAMP)

demo: setup
	$(BIN)/python -m pretrain.demo --out $(RUN) $(if $(DATA),--data "$(DATA)")

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: setup  # an empty XLA_FLAGS: programs are optimized as they are for users
	XLA_FLAGS= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/house.py .
	$(MAKE) smoke
	$(MAKE) test

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A real run of the real entry point on a corpus of a minute: data, labels, a few updates, resume, evaluation.
smoke: setup
	$(BIN)/python -m pretrain.demo --out "$$(mktemp -d)" --smoke

bench: setup
	$(BIN)/python -m bench
