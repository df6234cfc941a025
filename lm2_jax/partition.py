"""Arrays in parts on a mesh, by logical names: constraints, and functions that run on each device's own part.

Mesh axes are opaque words here: they come from the rules and the mesh of the active `Layout.context`.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from lm2_jax.registry import near_misses
from lm2_jax.state import map_axes
from lm2_jax.types import Array, Axes

_BY_HAND = contextvars.ContextVar("by_hand", default=True)


@contextlib.contextmanager
def automatic() -> Iterator[None]:
    """Inside it, `logical_shard_map` leaves everything to XLA's partitioner: the reference that tests compare with."""
    token = _BY_HAND.set(False)
    yield
    _BY_HAND.reset(token)


def is_split() -> bool:
    """Whether arrays lie in parts on several devices here, and XLA decides how each operation runs on them."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(nn.get_logical_axis_rules()) and not mesh.manual_axes and math.prod(mesh.shape.values()) > 1


def platform() -> str:
    """What the functions traced here will run on ("cpu", "gpu", "tpu"): the layout's devices, else those of jax."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def parts(name: str | None) -> int:
    """How many parts the active layout cuts this axis into; 1 without a layout."""
    return math.prod(_sizes(name).values())


def constrain(x: Array, axes: Axes) -> Array:
    """Shards `x` by logical axes, as the active layout says; without one, and on a device's own part, it does nothing.

    Where two dimensions want one mesh axis, the upper row of the table has it and the other dimension stays whole.

    Raises:
      ValueError: an unknown name, another number of names than dimensions, or a dimension that does not divide.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axes {axes} for an array of shape {x.shape}")
    wanted = [_sizes(name) for name in axes]
    if not is_split():
        return x
    precedence: list[str | None] = [name for name, _ in nn.get_logical_axis_rules()]
    spec: list[Any] = [None] * x.ndim
    taken: set[str] = set()
    named = [position for position, name in enumerate(axes) if name is not None]
    for position in sorted(named, key=lambda position: precedence.index(axes[position])):
        sizes = wanted[position]
        if taken.isdisjoint(sizes):
            _check_divides(x.shape[position], axes[position], sizes)
            taken.update(sizes)
            spec[position] = tuple(sizes) or None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def pin(x: Array, last: Sequence[str | None]) -> Array:
    """Shards the last dimensions of `x` by their names, None for a whole one, and leaves the others as they are."""
    if not is_split():
        return x
    spec = [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(last)) + [tuple(_sizes(name)) or None for name in last]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


class Shards:
    """The devices that share one logical axis, as a function inside `logical_shard_map` sees them.

    On one device, and where the partitioner is in charge, there is one shard and every method returns its argument.
    """

    def __init__(self, axes: tuple[str, ...] = (), size: int = 1):
        self._axes, self.size = axes, size

    def gather(self, x: Array, axis: int) -> Array:
        """All parts of dimension `axis`."""
        return x if self.size == 1 else jax.lax.all_gather(x, self._axes, axis=axis, tiled=True)

    def sum(self, x: Array) -> Array:
        """The sum over shards, on each of them."""
        return x if self.size == 1 else jax.lax.psum(x, self._axes)

    def scatter(self, x: Array, axis: int) -> Array:
        """The sum over shards, of which each keeps its part of dimension `axis`."""
        return x if self.size == 1 else jax.lax.psum_scatter(x, self._axes, scatter_dimension=axis, tiled=True)

    def turn(self, x: Any) -> Any:
        """A tree of the arrays of the next shard, in a ring."""
        ring = [((shard + 1) % self.size, shard) for shard in range(self.size)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self._axes, ring), x)

    def softmax(self, score: Array) -> Array:
        """softmax over the last dimension, of which each shard has a part; combined by the parts' log-sum-exp."""
        if self.size == 1:
            return jax.nn.softmax(score, axis=-1)
        part = jax.nn.logsumexp(score, axis=-1, keepdims=True)
        return jnp.exp(score - jax.nn.logsumexp(self.gather(part, -1 % score.ndim), axis=-1, keepdims=True))


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
      check: whether jax checks which values differ between devices; kernels do not say so and need False.
    Raises:
      ValueError: when called with a dimension that does not divide, or two dimensions of an array on one mesh axis.
    """

    @functools.wraps(fn)
    def mapped(*arguments: Any) -> Any:
        sizes = _sizes(reduce)
        if not (sizes and is_split() and _BY_HAND.get()):
            return fn(Shards(), *arguments)
        for argument, axes in zip(arguments, in_axes, strict=True):
            map_axes(_check_shape, axes, argument)
        shards = Shards(tuple(sizes), math.prod(sizes.values()))
        manual = jax.shard_map(
            functools.partial(fn, shards),
            in_specs=map_axes(_spec, in_axes),
            out_specs=map_axes(_spec, out_axes),
            check_vma=check,
        )
        return manual(*arguments)

    return mapped


def _sizes(name: str | None) -> dict[str, int]:
    """The mesh axes, of size above 1, that a logical axis lies on."""
    rules = dict(reversed(nn.get_logical_axis_rules()))  # the first row of a name counts
    if name is None or not rules:
        return {}
    if name not in rules:
        known = sorted(rules)
        raise ValueError(f"Axis names did not match a rule: {name!r}; known: {known}.{near_misses(name, known)}")
    row, shape = rules[name], jax.sharding.get_abstract_mesh().shape
    axes = () if row is None else (row,) if isinstance(row, str) else tuple(row)
    return {axis: shape[axis] for axis in axes if shape.get(axis, 1) > 1}


def _check_divides(size: int, name: str | None, sizes: dict[str, int]) -> None:
    if size % math.prod(sizes.values()):
        given = ", ".join(f"mesh.{axis}={n}" for axis, n in sizes.items())
        raise ValueError(f"{name}={size} is not divisible by {given}; change the size in the config, or the mesh")


def _check_shape(axes: Axes, x: Array) -> None:
    for name, size in zip(axes, x.shape, strict=True):
        _check_divides(size, name, _sizes(name))


def _spec(axes: Axes) -> PartitionSpec:
    return PartitionSpec(*(tuple(_sizes(name)) or None for name in axes))
