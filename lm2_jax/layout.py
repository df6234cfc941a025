"""How arrays lie on devices, as this package sees it: logical axis names only, never a mesh axis."""

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax.core import meta


@runtime_checkable
class Layout(Protocol):
    """What training, evaluation and checkpoints ask of the devices; `sharding.layout.Layout` is the one in use.

    A tree of axes has, in the place of each array, the tuple of its dimensions' logical names, such as
    `("batch", "slots", None)`; None is a dimension that is never split.
    """

    def context(self) -> AbstractContextManager[None]:
        """Inside it, logical axis names in a traced function mean this layout's devices."""
        ...

    def shardings(self, axes: Any, shapes: Any) -> Any:
        """Where each array of a tree lies.

        Args:
          axes: tree of logical axes.
          shapes: tree of arrays or `jax.ShapeDtypeStruct`s with the structure that the result has.
        Returns:
          A tree of `jax.sharding.Sharding`.
        Raises:
          UserError: an unknown name, or a dimension that the devices of its axis do not divide.
        """
        ...

    def check_used(self, axes: Any) -> None:
        """Refuses devices that would all do the same.

        Args:
          axes: tree of the logical axes of all arrays of a run.
        Raises:
          UserError: it says which.
        """
        ...

    def left_whole(self, arrays: Any) -> list[str]:
        """Large arrays of which every device holds all, though there are devices that could each hold a part.

        Args:
          arrays: tree of arrays where they lie.
        Returns:
          A line for each, the largest first, with its bytes.
        """
        ...

    def batch(self, arrays: Any) -> Any:
        """Global arrays from this process's rows of a batch.

        Args:
          arrays: tree of host arrays with rows first: those that `rows_of_process` gives to this process.
        Returns:
          The tree of `jax.Array`s with all rows, split over the devices.
        """
        ...

    def rows_of_process(self, rows: int) -> tuple[int, int]:
        """The rows of a global batch that this process reads.

        Args:
          rows: rows of the global batch.
        Returns:
          The first row and their number; processes whose devices hold copies of the same rows get the same.
        """
        ...


def whole(layout: Layout) -> Any:
    """Where an array lies of which every device has all, whatever its shape: what each process is to read."""
    return layout.shardings((), jax.ShapeDtypeStruct((), jnp.float32))


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes that say where their arrays are placed."""
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
    )


def axes_of(tree: Any) -> Any:
    """Logical axes of variables as Linen's `init` makes them, and of an optimizer's state made from those.

    Args:
      tree: arrays or shapes, boxed by `nn.with_logical_partitioning` where an array has named axes.
    Returns:
      The unboxed tree with a tuple of names for each array; all None for an array without a box.
    """

    def names(leaf: Any) -> tuple[str | None, ...]:
        if isinstance(leaf, meta.Partitioned):
            return tuple(leaf.names)
        return (None,) * len(jnp.shape(leaf))

    return jax.tree.map(names, tree, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
