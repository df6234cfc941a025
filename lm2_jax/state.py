"""Recurrent state as a tree of NamedTuples: resets, choice of rows, stacked layers; all found by logical axis names."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm2_jax.types import Array, Bool, Int, State


class Segments(NamedTuple):
    """Borders and padding of K segments; docs/life_of_a_segment.md explains each word."""

    reset: Bool[Array, "B K"]  # a document begins at this segment, so the row's state is its start
    cut: Bool[Array, " K"] | None  # no gradient flows from this segment into the one before; None: through all
    valid: Bool[Array, "B K T"]  # false: padding
    document: Int[Array, "B K T"] | None  # number of the document within the segment, where documents are packed


def full_segments(
    shape: tuple[int, int, int],
    reset: Array | None,
    valid: Array | None,
    document: Array | None,
    bptt_segments: int | None,
) -> Segments:
    """Borders and padding as arrays of full shape, [B J T]; arguments as of `LanguageModel.forward`.

    Raises:
      ValueError: an array of another shape.
    """
    B, J, T = shape
    reset_BJ = jnp.zeros((B, J), bool)
    if reset is not None:
        if reset.shape not in ((B,), (B, J)):
            raise ValueError(f"reset must have shape [B]={[B]} or [B, K]={[B, J]}, got {list(reset.shape)}")
        reset_BJ = reset_BJ.at[:, 0].set(reset) if reset.ndim == 1 else reset
    for name, array in (("valid", valid), ("document", document)):
        if array is not None and array.shape != (B, J * T):
            raise ValueError(f"{name} must have the shape of tokens, {[B, J * T]}, got {list(array.shape)}")
    valid_BJT = jnp.ones((B, J, T), bool) if valid is None else valid.reshape(B, J, T)
    cut_J = None if bptt_segments is None else (jnp.arange(J) > 0) & (jnp.arange(J) % bptt_segments == 0)
    return Segments(reset_BJ, cut_J, valid_BJT, None if document is None else document.reshape(B, J, T))


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
    """Rows of `yes` where the mask is true, rows of `no` elsewhere, bit for bit; either may have one row for all."""
    return map_axes(lambda a, y, n: jnp.where(along_batch(mask_B, a), y, n), axes, yes, no)


def _flagged(state: State, axes: State, change: Callable[[Array, tuple[str | None, ...]], Array]) -> State:
    def one(path: Any, leaf_axes: tuple[str | None, ...], leaf: Array) -> Array:
        return change(leaf, leaf_axes) if getattr(path[-1], "name", None) == "is_start" else leaf

    return jax.tree_util.tree_map_with_path(one, axes, state, is_leaf=is_axes)


def reset_rows(state: State, reset_B: Bool[Array, " B"], axes: State) -> State:
    """Marks rows as the start of a document; `begin_rows` puts the start in, at the next use."""
    return _flagged(state, axes, lambda flag, names: flag | along_batch(reset_B, names))


def clear_start(state: State, axes: State) -> State:
    """Marks all rows as written."""
    return _flagged(state, axes, lambda flag, _: jnp.zeros_like(flag))


def begin_rows(state: State, start: State, axes: State) -> State:
    """`state` with `start` (one row) in the rows that are marked as the start of a document."""
    is_start_B = state.is_start
    start = jax.tree.map(lambda s, leaf: s.astype(leaf.dtype), start, state)
    return select_rows(is_start_B, start, state, axes)._replace(is_start=is_start_B)


def check_state(axes: State, name: str) -> None:
    """Raises TypeError for a memory's state that could never be reset: one without the flag `is_start` [B]."""
    if getattr(axes, "is_start", None) != ("batch",):
        raise TypeError(
            f"the state of {name} must be a NamedTuple with a field is_start [B], whose axes are ('batch',); "
            f"its axes are {axes}"
        )


def stack_layers(state: State, layers: int) -> State:
    """The state of `layers` equal layers, the layers axis first."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (layers, *leaf.shape)), state)


def stack_axes(axes: State) -> State:
    """The axes of `stack_layers`."""
    return map_axes(lambda names: ("layers", *names), axes)


def stop_where(cut: Bool[Array, "*one"] | None, state: State) -> State:
    """`state`, without a gradient to where it came from if `cut` [] or [1]; None: unchanged."""
    if cut is None:
        return state

    def stop(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.where(cut.reshape(()), jax.lax.stop_gradient(leaf), leaf)

    return jax.tree.map(stop, state)


def state_floats(state: State) -> int:
    """Number of floating-point values in a state, which every comparison of memories reports."""
    return sum(leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))
