"""One tensor of a file that is read when it is wanted."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped


@dataclass(frozen=True)
class Source:
    """One tensor to be read: its name in the file, its shape, its numbers on demand."""

    key: str
    shape: tuple[int, ...]
    read: Callable[[], Shaped[np.ndarray, "..."]]
