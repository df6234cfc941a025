"""Scans that differ in what they keep for the backward pass (`memory.remat`)."""

from collections.abc import Callable
from typing import Any

import jax

Step = Callable[[Any, Any], tuple[Any, Any]]  # (carry, inputs) -> (carry, outputs)


def plain_scan(step: Step, carry: Any, inputs: Any, group: int) -> tuple[Any, Any]:
    """`jax.lax.scan`: keeps all intermediate results of each step."""
    return jax.lax.scan(step, carry, inputs)


def remat_scan(step: Step, carry: Any, inputs: Any, group: int) -> tuple[Any, Any]:
    """Keeps each step's carry and recomputes the rest."""
    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), carry, inputs)


def grouped_scan(step: Step, carry: Any, inputs: Any, group: int) -> tuple[Any, Any]:
    """Keeps the carry of every `group`-th step and recomputes the others and the rest.

    For n steps in groups of sqrt(n), the memory of the backward pass grows as sqrt(n). The cost is two more forward
    passes.

    Args:
      step: of the scan.
      carry: before the first step.
      inputs: leaves [n ...], where n is a multiple of `group`.
      group: steps per group.
    """
    steps = jax.tree.leaves(inputs)[0].shape[0]
    inputs = jax.tree.map(lambda a: a.reshape(steps // group, group, *a.shape[1:]), inputs)
    inner = jax.checkpoint(lambda carry, xs: remat_scan(step, carry, xs, group), prevent_cse=False)
    carry, outputs = jax.lax.scan(inner, carry, inputs)
    return carry, jax.tree.map(lambda a: a.reshape(steps, *a.shape[2:]), outputs)


SCANS = {"none": plain_scan, "chunks": remat_scan, "groups": grouped_scan}


def group_size(steps: int) -> int:
    """Steps per group for `grouped_scan`: about sqrt(steps), a divisor of steps if one lies in [sqrt, 2 sqrt]."""
    root = max(1, int(steps**0.5))
    near = [d for d in range(root, 2 * root + 1) if steps % d == 0]
    return near[0] if near else root
