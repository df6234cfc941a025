"""Recurrent state as a tree of NamedTuples: find its batch axis by name, reset rows, choose rows, stack layers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm2_jax.types import Array, Bool, State


def is_axes(leaf: Any) -> bool:
    """Whether `leaf` is the tuple of logical axis names of one array."""
    return type(leaf) is tuple and all(name is None or isinstance(name, str) for name in leaf)


def map_axes(fn: Callable[..., Any], axes: State, *states: State) -> State:
    """`fn(axes of a leaf, leaf, ...)` over trees of the same structure."""
    return jax.tree.map(fn, axes, *states, is_leaf=is_axes)


def along_batch(mask_B: Bool[Array, " B"], axes: tuple[str | None, ...]) -> Array:
    """`mask_B` with singleton dimensions, so that it broadcasts against an array with these axes."""
    shape = [1] * len(axes)
    shape[axes.index("batch")] = mask_B.shape[0]
    return mask_B.reshape(shape)


def select_rows(mask_B: Bool[Array, " B"], yes: State, no: State, axes: State) -> State:
    """Rows of `yes` where the mask is true, rows of `no` elsewhere, bit for bit."""
    return map_axes(lambda a, y, n: jnp.where(along_batch(mask_B, a), y, n), axes, yes, no)


def reset_rows(state: State, reset_B: Bool[Array, " B"], axes: State) -> State:
    """Marks rows as fresh; what a fresh row holds is the module's start, put in at its next use."""

    def mark(path: Any, leaf_axes: tuple[str | None, ...], leaf: Array) -> Array:
        name = getattr(path[-1], "name", None)
        return leaf | along_batch(reset_B, leaf_axes) if name == "fresh" else leaf

    return jax.tree_util.tree_map_with_path(mark, axes, state, is_leaf=is_axes)


def stack_layers(state: State, layers: int) -> State:
    """The state of `layers` equal layers, the layers axis first."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (layers, *leaf.shape)), state)


def stack_axes(axes: State) -> State:
    """The axes of `stack_layers`."""
    return map_axes(lambda names: ("layers", *names), axes)


def stop_where(cut: Bool[Array, ""], state: State) -> State:
    """`state`, with no gradient to where it came from if `cut`."""

    def stop(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.where(cut, jax.lax.stop_gradient(leaf), leaf)

    return jax.tree.map(stop, state)


def state_floats(state: State) -> int:
    """Numbers of all arrays of floating type: what a comparison of memories has to state."""
    return sum(leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))
