"""How whoever needs weights is given them, without knowing a file format."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from wavlm_jax.weights import Weights

Load: TypeAlias = Callable[[Path, int | None], Weights]
"""(where, checkpoint step or None) -> what is there; `wavlm_jax.loading.load_weights` knows every kind of source."""
