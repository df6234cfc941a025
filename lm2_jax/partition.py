"""Arrays in parts on several devices, by logical names: constraints, and functions that run on each device's own part.

What is said here is done by the `Partition` of the active `Layout.context`; without one, arrays are whole.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax

from lm2_jax.types import Array, Axes


class Shards:
    """The devices that share one logical axis, as a function inside `logical_shard_map` sees them.

    This class is the single shard that there is on one device, and where the partitioner is in charge.
    """

    size = 1

    def gather(self, x: Array, axis: int) -> Array:
        """All parts of dimension `axis`."""
        return x

    def sum(self, x: Array) -> Array:
        """The sum over shards, on each of them."""
        return x

    def scatter(self, x: Array, axis: int) -> Array:
        """The sum over shards, of which each keeps its part of dimension `axis`."""
        return x

    def enter(self, x: Any) -> Any:
        """A tree that is the same on all shards, of which each makes its own part: gradients are summed over shards."""
        return x

    def leave(self, x: Any) -> Any:
        """The sum of what each shard has of a tree, the same on all: gradients go to each as they are."""
        return x

    def receive(self, x: Any) -> Any:
        """An argument that no shard has its own part of, for an `fn` that enters and leaves."""
        return x

    def turn(self, x: Any) -> Any:
        """A tree of the arrays of the next shard, in a ring."""
        return x

    def softmax(self, score: Array) -> Array:
        """softmax over the last dimension, of which each shard has a part."""
        return jax.nn.softmax(score, axis=-1)


class Partition(Protocol):
    """How arrays lie in parts; `sharding.partition.MeshPartition` is the one in use."""

    def is_split(self) -> bool:
        """See below."""
        ...

    def parts(self, name: str | None) -> int:
        """See below."""
        ...

    def constrain(self, x: Array, axes: Axes) -> Array:
        """See below."""
        ...

    def pin(self, x: Array, last: Sequence[str | None]) -> Array:
        """See below."""
        ...

    def map_shards(
        self, fn: Callable[..., Any], in_axes: Any, out_axes: Any, reduce: str, check: bool
    ) -> Callable[..., Any] | None:
        """`logical_shard_map`, or None where `reduce` is not split."""
        ...

    def without(self, name: str) -> "Partition":
        """The same for arrays of which this axis stays whole."""
        ...


_ACTIVE: contextvars.ContextVar[Partition | None] = contextvars.ContextVar("partition", default=None)
_BY_HAND = contextvars.ContextVar("by_hand", default=True)


@contextlib.contextmanager
def use(partition: Partition | None) -> Iterator[None]:
    """Inside it, logical names mean the parts of this partition; None: all arrays are whole."""
    token = _ACTIVE.set(partition)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextlib.contextmanager
def automatic() -> Iterator[None]:
    """Inside it, `logical_shard_map` leaves everything to XLA's partitioner: the reference that tests compare with."""
    token = _BY_HAND.set(False)
    try:
        yield
    finally:
        _BY_HAND.reset(token)


@contextlib.contextmanager
def whole(name: str) -> Iterator[None]:
    """Inside it an axis is not cut, for arrays that hold one entry for all."""
    partition = _ACTIVE.get()
    with use(None if partition is None else partition.without(name)):
        yield


def is_split() -> bool:
    """Whether arrays lie in parts on several devices here, and XLA decides how each operation runs on them."""
    partition = _ACTIVE.get()
    return partition is not None and partition.is_split()


def parts(name: str | None) -> int:
    """How many parts the active layout cuts this axis into; 1 without a layout."""
    partition = _ACTIVE.get()
    return 1 if partition is None else partition.parts(name)


def constrain(x: Array, axes: Axes) -> Array:
    """Shards `x` by logical axes, as the active layout says; without one, and on a device's own part, it does nothing.

    Where two dimensions want the same devices, the upper row of the table has them and the other dimension is whole.

    Raises:
      ValueError: an unknown name, another number of names than dimensions, or a dimension that does not divide.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axes {axes} for an array of shape {x.shape}")
    partition = _ACTIVE.get()
    return x if partition is None else partition.constrain(x, axes)


def pin(x: Array, last: Sequence[str | None]) -> Array:
    """Shards the last dimensions of `x` by their names, None for a whole one, and leaves the others as they are."""
    partition = _ACTIVE.get()
    return x if partition is None else partition.pin(x, last)


def logical_shard_map(
    fn: Callable[..., Any], in_axes: Any, out_axes: Any, reduce: str = "slots", check: bool = True
) -> Callable[..., Any]:
    """`fn(shards, *arguments)` on each device's part of the arguments, where the active layout splits `reduce`.

    Elsewhere `fn` is called on whole arrays with a single shard, and the partitioner does what there is to do.

    Args:
      fn: takes the `Shards` of `reduce` first; it may combine over those only.
      in_axes: for each argument, a tree with the tuple of logical names in the place of each array.
      out_axes: the same for the result.
      reduce: the logical axis over which `fn` combines, or along which its parts are independent.
      check: whether jax follows which values differ between devices, for cheaper gradients. Kernels do not say so and
        need False; so does an `fn` that differentiates, for jax would sum its gradients over the devices.
    Raises:
      ValueError: when called with a dimension that does not divide, or two dimensions of an array on one mesh axis.
    """
    partition, mapped = _ACTIVE.get(), None
    if partition is not None and _BY_HAND.get():
        mapped = partition.map_shards(fn, in_axes, out_axes, reduce, check)
    return (lambda *arguments: fn(Shards(), *arguments)) if mapped is None else mapped
