"""Finds arrays that a mesh replicates on every device, before they run a device out of memory."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from lm2_jax.errors import UserError


class Placement(NamedTuple):
    """An array of a run and its shard on one device."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes: int
    device_bytes: int


def placements(shapes: Any, shardings: Any) -> Iterator[Placement]:
    """The placement of every array of a tree.

    Args:
      shapes: tree of arrays or `jax.ShapeDtypeStruct`s.
      shardings: tree of their `NamedSharding`s.
    """
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shard = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total = math.prod(leaf.shape) * leaf.dtype.itemsize
        yield Placement(name, tuple(leaf.shape), leaf.dtype.name, describe_spec(sharding), total, shard)


def describe_spec(sharding: Any) -> str:
    """The mesh axes of each dimension, without those of size 1, such as `fsdp+slots, model, -`."""
    shape, spec = sharding.mesh.shape, sharding.spec
    parts = ((axes,) if isinstance(axes, str) else axes or () for axes in spec)
    return ", ".join("+".join(axis for axis in axes if shape[axis] > 1) or "-" for axes in parts)


def describe_replicated(array: Placement) -> str:
    """A line about a replicated array."""
    return f"{array.path} {array.shape}: {array.bytes:,} bytes on each device"


def replicated_arrays(shapes: Any, shardings: Any, least_bytes: int = 2**20) -> list[Placement]:
    """Arrays of `least_bytes` or more that are replicated on every device although the mesh could split them.

    Replicas of the model are the purpose of the axis `data`: on a mesh with no other axis the result is empty.
    """
    meshes = [sharding.mesh for sharding in jax.tree.leaves(shardings)[:1]]  # none for an empty tree
    if all(size == 1 for mesh in meshes for axis, size in mesh.shape.items() if axis != "data"):
        return []
    return [array for array in placements(shapes, shardings) if array.bytes == array.device_bytes >= least_bytes]


def assert_sharded(shapes: Any, shardings: Any, least_bytes: int = 2**20) -> None:
    """Raises an error if parameters or states are replicated by accident.

    Args:
      shapes: tree of arrays or `jax.ShapeDtypeStruct`s.
      shardings: tree of their `NamedSharding`s.
      least_bytes: smaller arrays may be replicated: norms, biases, counters.
    Raises:
      UserError: there are such arrays; the message lists them with their bytes.
    """
    found = replicated_arrays(shapes, shardings, least_bytes)
    if found:
        lines = "".join(f"\n  {describe_replicated(array)}" for array in found)
        raise UserError(
            f"{len(found)} arrays would be replicated on every device:{lines}\nName their dimensions by axes that "
            "sharding/rules.py splits."
        )
