"""FLOPs of the matrix products and convolutions of a traced program, loops counted as often as they run.

Counted in the jaxpr, before the compiler: what the mathematics asks for, recomputation included, on all devices
together.
A multiplication and an addition are two. Element-wise work is left out: it does not run on the matrix units.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def matrix_flops(jaxpr: ClosedJaxpr | Jaxpr, platform: str | None = None) -> int:
    """FLOPs of one execution.

    Args:
        jaxpr: of `jax.jit(f).trace(...).jaxpr` or `jax.make_jaxpr`. Of a `cond` the costliest branch counts, of a
            `while` whose turns depend on the data one turn.
        platform: "tpu", "cuda", "cpu": of `jax.lax.platform_dependent` its branch counts; None: the costliest.

    """
    body = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_flops(equation, platform) for equation in body.eqns)


def loop_outputs(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """Bytes that forward loops (`scan`) stack up: what a scanned model keeps for its backward pass, at its largest.

    Loops that run backwards stack gradients and are left out.
    """
    body = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    total = 0
    for equation in body.eqns:
        inside = [loop_outputs(inner) for inner in _inner(equation)]
        if equation.primitive.name == "scan" and not equation.params["reverse"]:
            stacked: list[Any] = [var.aval for var in equation.outvars[equation.params["num_carry"] :]]
            total += sum(math.prod(array.shape) * array.dtype.itemsize for array in stacked)
        total += max(inside, default=0) if equation.primitive.name == "cond" else sum(inside)
    return total


def _flops(equation: JaxprEqn, platform: str | None) -> int:
    name = equation.primitive.name
    if name in _COUNTED:
        return _COUNTED[name](equation)
    inner = [matrix_flops(part, platform) for part in _inner(equation)]
    if name == "cond":
        taken = _taken(equation, platform)
        return max(inner, default=0) if taken is None else inner[taken]
    return _times(equation) * sum(inner)


def _taken(equation: JaxprEqn, platform: str | None) -> int | None:
    """Which branch of a `cond` runs on the platform; None: the data decide."""
    platforms = equation.params.get("branches_platforms")
    if platform is None or platforms is None:
        return None
    return next(number for number, names in enumerate(platforms) if names is None or platform in names)


def _times(equation: JaxprEqn) -> int:
    """How often the inside of an equation runs."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return int(params["length"])
    if name == "pallas_call":
        return math.prod(int(size) for size in params["grid_mapping"].grid)
    if name == "shard_map":
        axes = next(params[key] for key in ("newly_manual_axes", "manual_axes") if key in params)  # by JAX's version
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    return 1


def _inner(equation: JaxprEqn) -> Iterator[ClosedJaxpr | Jaxpr]:
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, (ClosedJaxpr, Jaxpr)):
                yield part


def _dot(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left: Any = equation.invars[0].aval
    result: Any = equation.outvars[0].aval
    return 2 * math.prod(result.shape) * math.prod(left.shape[axis] for axis in contracted)


def _convolution(equation: JaxprEqn) -> int:
    """Each output element takes one product for each kernel element; zeros that dilation puts in are not computed."""
    params = equation.params
    kernel: Any = equation.invars[1].aval
    result: Any = equation.outvars[0].aval
    out_channels = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    products = math.prod(result.shape) * (math.prod(kernel.shape) // out_channels)
    return 2 * products // math.prod(params["lhs_dilation"])


_COUNTED: dict[str, Callable[[JaxprEqn], int]] = {"dot_general": _dot, "conv_general_dilated": _convolution}
