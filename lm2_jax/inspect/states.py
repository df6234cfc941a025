"""The arrays of a recurrent state by block, with names for people."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax.model import ModelState, layer_groups
from lm2_jax.runs import Run
from lm2_jax.state import map_axes


class StateArray(NamedTuple):
    """One array of the state of one block, or of the stack."""

    label: str  # such as "slots, block 0"
    slot_axis: int | None
    values: np.ndarray  # float32 at least, without the axes of rows and layers


class _Leaf(NamedTuple):
    axes: tuple[str | None, ...]
    values: Any


def state_arrays(run: Run, state: ModelState) -> list[StateArray]:
    """The floating-point arrays of the state of one row, block by block.

    Arrays along an axis "window" (attention windows, inputs of convolutions) hold the last tokens themselves and say
    nothing about a memory; they are left out.
    """
    firsts = [group.first for group in layer_groups(run.config.model)]
    tree = map_axes(_Leaf, run.model.state_axes(), state)
    found = []
    for path, (axes, values) in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, _Leaf)):
        if not jnp.issubdtype(values.dtype, jnp.floating) or "window" in axes:
            continue
        names = [str(getattr(entry, "name", getattr(entry, "idx", ""))) for entry in path]
        values = np.asarray(values)
        values = np.squeeze(values.astype(np.promote_types(values.dtype, np.float32)), axes.index("batch"))
        left = [name for name in axes if name != "batch"]
        if names[0] != "groups":
            found.append(StateArray(f"{_name(names[1:])}, all blocks", _slots(left), values))
            continue
        for i, layer in enumerate(np.moveaxis(values, left.index("layers"), 0)):
            label = f"{_name(names[2:])}, block {firsts[int(names[1])] + i}"
            found.append(StateArray(label, _slots([name for name in left if name != "layers"]), layer))
    return found


def _name(names: list[str]) -> str:
    return " ".join(name for name in names if name != "memory")


def _slots(axes: list[str | None]) -> int | None:
    return axes.index("slots") if "slots" in axes else None
