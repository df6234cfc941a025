"""Floating-point operations of a traced function, counted on its jaxpr and independent of devices."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from lm2_jax.attention.splash import kernel_flops


def traced_flops(fn: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of all matrix products in one call; loop bodies count once per iteration.

    The count is taken from the equations that jax traces. It includes recomputation in a backward pass and excludes
    elementwise operations; what a compiler changes is not seen.

    Args:
      fn: any function of arrays.
      arguments: arrays or `jax.ShapeDtypeStruct`s.
    """
    return jaxpr_flops(jax.make_jaxpr(fn)(*arguments).jaxpr)


def jaxpr_flops(jaxpr: core.Jaxpr, scope: str = "") -> float:
    """As `traced_flops`, for a function that is already traced; `scope` is the name stack of its caller."""
    return sum(_equation_flops(equation, scope) for equation in jaxpr.eqns)


def _equation_flops(equation: core.JaxprEqn, scope: str) -> float:
    scope = f"{scope}/{equation.source_info.name_stack}"
    name, params = equation.primitive.name, equation.params
    inputs: list[Any] = [variable.aval for variable in equation.invars]
    outputs: list[Any] = [variable.aval for variable in equation.outvars]
    if name == "dot_general":
        (summed, _), _ = params["dimension_numbers"]
        return 2.0 * math.prod(outputs[0].shape) * math.prod(inputs[0].shape[d] for d in summed)
    if name == "conv_general_dilated":
        kernel = inputs[1].shape
        return 2.0 * math.prod(outputs[0].shape) * math.prod(kernel) / kernel[params["dimension_numbers"].rhs_spec[0]]
    if name == "pallas_call":
        shapes = [a.shape for a in inputs if jnp.issubdtype(a.dtype, jnp.inexact)]
        return float(kernel_flops(f"{scope}/{params['name']}", shapes))
    inner = [jaxpr_flops(jaxpr, scope) for jaxpr in _inner(params)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "shard_map":  # its equations are for one device
        axes = params.get("newly_manual_axes") or params["manual_axes"]  # newer and older jax
        return math.prod(params["mesh"].shape[axis] for axis in axes) * sum(inner)
    return sum(inner)


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The jaxprs that an equation calls. The body of a while loop counts once, as its iterations are not known."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
