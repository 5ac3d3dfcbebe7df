"""Names for the leaves of a tree of arrays."""

from typing import Any

import jax

KeyPath = tuple[Any, ...]


def path_name(path: KeyPath) -> str:
    """A tree path as "encoder/layers/attention/q_proj/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
