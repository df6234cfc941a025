"""Helpers about the placement of arrays, by logical axis names."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from lm2_jax.sharding.layout import Layout as Layout


def replicated(layout: Layout) -> Any:
    """The sharding of an array of any shape that every device holds completely, such as a metric."""
    return layout.shardings((), jax.ShapeDtypeStruct((), jnp.float32))


def sharded_shapes(shapes: Any, shardings: Any) -> Any:
    """`jax.ShapeDtypeStruct`s with shardings: what to restore a checkpoint to, or arguments to compile for.

    Args:
      shapes: tree of arrays or `jax.ShapeDtypeStruct`s.
      shardings: tree of their shardings, or one sharding for all.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
    )


def axes_of(tree: Any) -> Any:
    """Logical axes of variables as Linen's `init` returns them, or of an optimizer state made from those.

    Args:
      tree: arrays or shapes; those with named axes are boxed by `nn.with_logical_partitioning`.
    Returns:
      The unboxed tree with a tuple of names in place of each array; all None for an array without a box.
    """

    def names(leaf: Any) -> tuple[str | None, ...]:
        if isinstance(leaf, meta.Partitioned):
            return tuple(leaf.names)
        return (None,) * len(jnp.shape(leaf))

    return jax.tree.map(names, tree, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
