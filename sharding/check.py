"""What a mesh leaves whole on every device, told before it is found out by running out of memory."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from lm2_jax.errors import UserError


class Placed(NamedTuple):
    """One array of a run and its part on one device."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes: int
    device_bytes: int


def placed(shapes: Any, shardings: Any) -> Iterator[Placed]:
    """Every array of a tree.

    Args:
      shapes: tree of arrays or `jax.ShapeDtypeStruct`s.
      shardings: tree of their `NamedSharding`s.
    """
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        here = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        whole = math.prod(leaf.shape) * leaf.dtype.itemsize
        yield Placed(name, tuple(leaf.shape), leaf.dtype.name, describe_spec(sharding), whole, here)


def describe_spec(sharding: Any) -> str:
    """Mesh axes of each dimension, those of size 1 left out, as in `fsdp+slots, model, -`."""
    shape, spec = sharding.mesh.shape, sharding.spec
    parts = ((axes,) if isinstance(axes, str) else axes or () for axes in spec)
    return ", ".join("+".join(axis for axis in axes if shape[axis] > 1) or "-" for axes in parts)


def describe_whole(array: Placed) -> str:
    """The line of an array of which each device has all."""
    return f"{array.path} {array.shape}: {array.bytes:,} bytes on each device"


def unsharded(shapes: Any, shardings: Any, least_bytes: int = 2**20) -> list[Placed]:
    """Arrays of `least_bytes` or more that every device holds whole, though the mesh has an axis to split them on.

    Copies along `data` are what that axis is for: on a mesh of nothing else, all parameters are whole on purpose.
    """
    meshes = [sharding.mesh for sharding in jax.tree.leaves(shardings)[:1]]  # none where there is no array
    if all(size == 1 for mesh in meshes for axis, size in mesh.shape.items() if axis != "data"):
        return []
    return [array for array in placed(shapes, shardings) if array.bytes == array.device_bytes >= least_bytes]


def assert_sharded(shapes: Any, shardings: Any, least_bytes: int = 2**20) -> None:
    """Refuses parameters and states that are replicated by accident.

    Args:
      shapes: tree of arrays or `jax.ShapeDtypeStruct`s.
      shardings: tree of their `NamedSharding`s.
      least_bytes: smaller arrays may be whole: norms, biases, counters.
    Raises:
      UserError: a list of them, with bytes.
    """
    whole = unsharded(shapes, shardings, least_bytes)
    if whole:
        lines = "".join(f"\n  {describe_whole(array)}" for array in whole)
        raise UserError(
            f"{len(whole)} arrays would lie whole on every device:{lines}\nName their dimensions by axes that "
            "sharding/rules.py splits."
        )
