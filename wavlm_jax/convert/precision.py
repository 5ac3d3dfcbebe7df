"""The precisions that weights are written in."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np

from wavlm_jax.convert.names import ConversionError

Precision: TypeAlias = Literal["float32", "float16", "bfloat16"]
DTYPES: Mapping[Precision, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def rounded(name: str, tensor: np.ndarray, dtype: Precision) -> np.ndarray:
    """The tensor in a precision, C-contiguous; one that is like that already is given back itself.

    Raises:
        ConversionError: numbers that are not finite in it; the tensor is named.

    """
    with np.errstate(over="ignore"):
        result = np.asarray(tensor, DTYPES[dtype], order="C")
    if not np.isfinite(result).all():
        raise ConversionError(f"{name} holds numbers that {dtype} has no room for")
    return result
