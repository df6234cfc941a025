"""Constraints and per-device programs for activations, by logical axis names.

A traced function calls the functions of this module; what they do is decided by the `Partition` of the active
`Layout.context()`. Outside of any context nothing is split, and they return their arguments.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from lm2_jax.types import Array, Axes


class Shards:
    """The devices that share one logical axis, as seen by a function inside `logical_shard_map`.

    This class is the case of a single shard; `sharding.partition.MeshShards` is that of several devices.
    """

    size = 1

    def gather(self, x: Array, axis: int) -> Array:
        """All shards of dimension `axis`, on each device (all-gather)."""
        return x

    def sum(self, x: Array) -> Array:
        """The sum over shards, on each device (all-reduce)."""
        return x

    def scatter(self, x: Array, axis: int) -> Array:
        """The sum over shards, of which each device keeps its shard of dimension `axis` (reduce-scatter)."""
        return x

    def copy_to(self, x: Any) -> Any:
        """Marks a replicated tree as the input of sharded work: identity forward, all-reduce backward."""
        return x

    def reduce_from(self, x: Any) -> Any:
        """Sums the partial results of sharded work into a replicated tree: all-reduce forward, identity backward."""
        return x

    def scale_replicated_grad(self, x: Any) -> Any:
        """Marks a replicated argument of an `fn` that uses `copy_to` and `reduce_from`.

        jax sums the gradients of such an argument over shards, although each shard has the full gradient already. This
        is the identity forward, and divides the gradient by the number of shards.
        """
        return x

    def ring_permute(self, x: Any) -> Any:
        """A tree of the arrays of the next shard in a ring."""
        return x

    def softmax(self, score: Array) -> Array:
        """The softmax over the last dimension, of which each device has a shard."""
        return jax.nn.softmax(score, axis=-1)


class Partition:
    """How activations are split over devices; the functions of the same names describe the methods.

    This class is the case of a single device; `sharding.partition.MeshPartition` is that of a mesh.
    """

    def is_split(self) -> bool:
        return False

    def num_shards(self, name: str | None) -> int:
        return 1

    def constrain(self, x: Array, axes: Axes) -> Array:
        return x

    def constrain_last(self, x: Array, last: Sequence[str | None]) -> Array:
        return x

    def map_shards(
        self, fn: Callable[..., Any], in_axes: Any, out_axes: Any, reduce: str, check: bool
    ) -> Callable[..., Any] | None:
        """`logical_shard_map`, or None where `reduce` is not split."""
        return None

    def without(self, name: str) -> "Partition":
        """The same partition, except that the axis `name` is replicated."""
        return self


# Flax modules have no argument for it, so the active partition is held here. It is a context variable: set for the
# duration of a `with` block, separately in each thread.
_ACTIVE: contextvars.ContextVar[Partition] = contextvars.ContextVar("partition", default=Partition())  # noqa: B039  it has no state


@contextlib.contextmanager
def use(partition: Partition | None) -> Iterator[None]:
    """Makes a partition the active one inside the `with` block; None: nothing is split."""
    token = _ACTIVE.set(partition or Partition())
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextlib.contextmanager
def replicated(name: str) -> Iterator[None]:
    """Inside the `with` block an axis is not split: for arrays with a single entry along it that serves all devices."""
    with use(_ACTIVE.get().without(name)):
        yield


def is_split() -> bool:
    """Whether arrays are split over several devices and XLA's partitioner decides how each operation runs on them."""
    return _ACTIVE.get().is_split()


def num_shards(name: str | None) -> int:
    """Number of shards of a logical axis; 1 for None, and outside of a layout's context."""
    return _ACTIVE.get().num_shards(name)


def constrain(x: Array, axes: Axes) -> Array:
    """Constrains the sharding of `x` by logical axes.

    If two dimensions map to the same mesh axis, the one whose name is higher in the table of rules gets it, and the
    other is replicated. Inside `logical_shard_map`, and outside of a layout's context, nothing happens.

    Raises:
      ValueError: an unknown name, another number of names than dimensions, or a dimension that does not divide.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axes {axes} for an array of shape {x.shape}")
    return _ACTIVE.get().constrain(x, axes)


def constrain_last(x: Array, last: Sequence[str | None]) -> Array:
    """Constrains the last dimensions of `x` by their names, None for a replicated one; the others stay as they are."""
    return _ACTIVE.get().constrain_last(x, last)


def logical_shard_map(
    fn: Callable[..., Any], in_axes: Any, out_axes: Any, reduce: str = "slots", check: bool = True
) -> Callable[..., Any]:
    """A `jax.shard_map` by logical axes: `fn(shards, *arguments)` runs on each device's shards of the arguments.

    If the axis `reduce` is not split, `fn` is called on the complete arrays with a single shard instead, and XLA's
    partitioner handles the other axes.

    Args:
      fn: takes the `Shards` of `reduce` first; it may combine over those only.
      in_axes: for each argument, a tree with a tuple of logical names in place of each array.
      out_axes: the same for the result.
      reduce: the logical axis over which `fn` combines, or along which its parts are independent.
      check: whether jax tracks which values differ between devices, which makes gradients cheaper. Pass False for a
        Pallas kernel, which gives no such information, and for an `fn` that differentiates, whose gradients jax would
        sum over devices.
    Raises:
      ValueError: when called with a dimension that does not divide, or two dimensions of an array on one mesh axis.
    """
    mapped = _ACTIVE.get().map_shards(fn, in_axes, out_axes, reduce, check)
    return (lambda *arguments: fn(Shards(), *arguments)) if mapped is None else mapped
