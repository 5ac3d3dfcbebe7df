"""Memory of a test worker, which has to stay under 4 GB."""

import ctypes
import gc

import jax


def give_memory_back() -> None:
    """Drops JAX's compiled programs, and returns to the system what malloc keeps of freed arrays."""
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
