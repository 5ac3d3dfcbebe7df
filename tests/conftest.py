"""Every test runs with shapes and types checked, rank promotion an error, and full float32 matrix products."""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

install_import_hook(["wavlm_jax", "pretrain"], "beartype.beartype")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

collect_ignore = ["test_beam.py"] if sys.version_info >= (3, 13) else []
"""flashlight-text has no wheel there (docs/dependencies.md); what a user is told instead is in test_decoding.py."""


@pytest.fixture(scope="session", autouse=True)
def _flags_parsed() -> None:
    """Grain's worker processes read absl flags, which nobody parses under pytest."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """A bucket of a server of its own; imported here, because few tests need what serves it."""
    from tests.support.buckets import serving

    with serving(tmp_path_factory.mktemp("server")) as found:
        yield found
