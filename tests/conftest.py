"""Every test runs with shapes and types checked, rank promotion an error, and full float32 matrix products."""

import atexit
import gc
import importlib.metadata
import os
import shutil
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads wait in a busy loop, and each core has a worker

# One folder of compiled programs per session (JAX's persistent compilation cache): both workers, and the processes that
# tests start, share them. XLA compiles eight times faster with these flags, and its programs run three times slower:
# a gain for programs that run a few times. All processes of a test have them; `make test-slow` goes without.
FAST_COMPILE = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (
    0,
    11,
):  # newer ones end at a flag they do not know
    FAST_COMPILE.append("--xla_cpu_use_fusion_emitters=false")
if "PYTEST_XDIST_WORKER" not in os.environ:
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        programs = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="wavlm-jax-programs-")
        atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    os.environ.setdefault("XLA_FLAGS", " ".join(FAST_COMPILE))

from jaxtyping import install_import_hook

install_import_hook(["wavlm_jax", "pretrain"], "beartype.beartype")

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")

from tests.support.memory import give_memory_back

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

collect_ignore = ["text/test_beam.py"] if sys.version_info >= (3, 13) else []
"""flashlight-text has no wheel there (docs/dependencies.md); what a user is told instead is in test_decoding.py."""


gc.set_threshold(100_000, 50, 100)  # an eighth of the CPU time of tracing is the default's collections


LONGEST = ("test_run_plan.py", "test_pod_runs.py", "test_process.py", "test_label_hosts.py", "test_make_labels.py")


def pytest_collection_modifyitems(items):
    """Files of few and long tests come first, so that the workers end at about the same time."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish():
    """What was imported stays to the end: no collection looks at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _flags_parsed() -> None:
    """Grain's worker processes read absl flags, which nobody parses under pytest."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module", autouse=True)
def _memory_given_back():
    """A worker keeps neither the programs of a file that is done nor the memory that malloc holds on to."""
    yield
    give_memory_back()


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """A bucket of a server of its own; imported here, because few tests need what serves it."""
    from tests.support.buckets import serving

    with serving(tmp_path_factory.mktemp("server")) as found:
        yield found
