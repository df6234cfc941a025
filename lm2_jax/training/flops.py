"""Floating-point operations of a traced function, whatever its devices: what its equations say."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from lm2_jax.attention.splash import kernel_flops


def traced_flops(fn: Callable[..., Any], *arguments: Any) -> float:
    """Operations of all matrix products in one call, loop bodies times their trip counts.

    Counted on the equations that jax traces, so recomputation in a backward pass counts, and nothing that a compiler
    does. Elementwise work is left out.

    Args:
      fn: any function of arrays.
      arguments: arrays or `jax.ShapeDtypeStruct`s.
    """
    return jaxpr_flops(jax.make_jaxpr(fn)(*arguments).jaxpr)


def jaxpr_flops(jaxpr: core.Jaxpr, scope: str = "") -> float:
    """The same of a function that is traced already; `scope` are the names of what it is called in."""
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
    if name == "shard_map":  # its equations are those of one device
        axes = params.get("newly_manual_axes") or params["manual_axes"]  # newer and older jax
        return math.prod(params["mesh"].shape[axis] for axis in axes) * sum(inner)
    return sum(inner)


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """Functions that an equation calls; of a while loop, whose trips are not known, the body once."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
