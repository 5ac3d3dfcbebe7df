"""Low-rank adapters (LoRA, arXiv 2106.09685): a kernel W becomes W + alpha / rank * A B, and only A and B are trained.

The adapters are a branch of the parameter tree beside the encoder: `lora/` and the path of the kernel. They are merged
into the kernels before the model is applied, so no model knows about them and any projection can have them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from wavlm_jax.settings import SettingsError
from wavlm_jax.shapes import Params, StepKey
from wavlm_jax.training.sharding import path_name

BRANCH = "lora"
_BODY = "wavlm"
_STACKED = "encoder/layers/"
_MATRIX = 2


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """The config section `lora`."""

    pattern: str | None
    """Regular expression; projections of the encoder whose path has a match get adapters, and the encoder itself is
    frozen: "attention/(q|v)_proj", "attention/|feed_forward/". None: no adapters."""
    rank: int
    alpha: float
    """The product A B is scaled by alpha / rank."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: found {self.rank}, expected 1 or more")
        if self.alpha <= 0:
            raise ValueError(f"alpha: found {self.alpha}, expected more than 0")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern: {self.pattern!r} is no regular expression: {error}") from error


def adapted(body: Params, settings: LoRASettings) -> dict[str, Any]:
    """The kernels that get adapters, by path.

    Args:
        body: parameters of the encoder, or their shapes.
        settings: with a pattern.

    Raises:
        SettingsError: the pattern matches no projection; the message lists them.

    """
    names = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(body)}
    projections = {
        name: leaf
        for name, leaf in names.items()
        if name.endswith("/kernel") and leaf.ndim == _MATRIX + (_STACKED in name)
    }
    found = {name: leaf for name, leaf in projections.items() if re.search(settings.pattern or "", name)}
    if not found:
        raise SettingsError(
            f"config.lora.pattern: no projection's path contains {settings.pattern!r}; there are "
            f"{', '.join(sorted(projections))}"
        )
    return found


def fresh_adapters(body: Params, settings: LoRASettings, key: StepKey) -> Params:
    """Initial adapters, whose product is zero: A uniform in +-1 / sqrt(inputs), B zero.

    A kernel (inputs, outputs) gets `a` (inputs, rank) and `b` (rank, outputs), stacked layers one pair per layer.

    Raises:
        SettingsError: the pattern matches no projection.

    """
    tree: dict[str, Any] = {}
    for number, (name, kernel) in enumerate(sorted(adapted(body, settings).items())):
        *stack, inputs, outputs = kernel.shape
        bound = inputs**-0.5
        a = jax.random.uniform(
            jax.random.fold_in(key, number), (*stack, inputs, settings.rank), jnp.float32, -bound, bound
        )
        node = tree.setdefault(_BODY, {})
        for part in name.split("/"):
            node = node.setdefault(part, {})
        node |= {"a": a, "b": jnp.zeros((*stack, settings.rank, outputs), jnp.float32)}
    return tree


def merged(params: Params, settings: LoRASettings, product: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """`params` without the branch of adapters, their products added to the kernels.

    Args:
        params: of a model with a head, with or without adapters.
        settings: of the adapters.
        product: matrix product, batched; `exact_product` inside jit, `numpy.matmul` on the host.

    """
    scale = settings.alpha / settings.rank
    body = {name: part for name, part in params.items() if name != BRANCH}
    return _folded(body, params[BRANCH], lambda w, a, b: w + scale * product(a, b)) if BRANCH in params else body


def exact_product(a: Any, b: Any) -> jax.Array:
    """Batched matrix product in full float32 precision, also on TPUs."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _folded(params: Mapping[str, Any], branch: Mapping[str, Any], fold: Callable[..., Any]) -> dict[str, Any]:
    result = dict(params)
    for name, part in branch.items():
        pair = set(part) == {"a", "b"} and not isinstance(part["a"], Mapping)
        result[name] = fold(params[name], part["a"], part["b"]) if pair else _folded(params[name], part, fold)
    return result
