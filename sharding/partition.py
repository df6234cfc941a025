"""The `lm2_jax.partition.Partition` of a mesh: sharding constraints and shard_map by logical axis names."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm2_jax.partition import Partition, Shards
from lm2_jax.registry import near_misses
from lm2_jax.sharding.rules import FIELDS, Rule, mesh_axes
from lm2_jax.state import map_axes
from lm2_jax.types import Array, Axes


class MeshShards(Shards):
    """The devices along some mesh axes; methods are described in the base class."""

    def __init__(self, sizes: dict[str, int]):
        self._axes, self.size = tuple(sizes), math.prod(sizes.values())

    def gather(self, x: Array, axis: int) -> Array:
        return jax.lax.all_gather(x, self._axes, axis=axis, tiled=True)

    def sum(self, x: Array) -> Array:
        return jax.lax.psum(x, self._axes)

    def scatter(self, x: Array, axis: int) -> Array:
        return jax.lax.psum_scatter(x, self._axes, scatter_dimension=axis, tiled=True)

    def copy_to(self, x: Any) -> Any:
        return _copy_to(x, self._axes)

    def reduce_from(self, x: Any) -> Any:
        return _reduce_from(x, self._axes)

    def scale_replicated_grad(self, x: Any) -> Any:
        return _scale_replicated_grad(x, self.size)

    def ring_permute(self, x: Any) -> Any:
        ring = [((shard + 1) % self.size, shard) for shard in range(self.size)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self._axes, ring), x)

    def softmax(self, score: Array) -> Array:
        """exp(score - L), with L the log-sum-exp over all shards, computed from that of each shard."""
        part = jax.nn.logsumexp(score, axis=-1, keepdims=True)
        return jnp.exp(score - jax.nn.logsumexp(self.gather(part, score.ndim - 1), axis=-1, keepdims=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _copy_to(x: Any, axes: tuple[str, ...]) -> Any:
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _reduce_from(x: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.psum(x, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scale_replicated_grad(x: Any, size: int) -> Any:
    return x


# `_copy_to` and `_reduce_from` are each other's derivative, to any order.
_copy_to.defvjp(lambda x, axes: (_copy_to(x, axes), None), lambda axes, _, dy: (_reduce_from(dy, axes),))
_reduce_from.defvjp(lambda x, axes: (_reduce_from(x, axes), None), lambda axes, _, dy: (_copy_to(dy, axes),))
_scale_replicated_grad.defvjp(lambda x, size: (x, None), lambda size, _, dy: (jax.tree.map(lambda a: a / size, dy),))


class MeshPartition(Partition):
    """The partition of a mesh by a table of rules; methods are described in the base class.

    Args:
      shape: sizes of the mesh axes.
      rules: the table. If two dimensions of an activation map to one mesh axis, the higher row gets it.
    """

    def __init__(self, shape: dict[str, int], rules: Iterable[Rule]):
        self._shape, self._table = shape, dict(rules)
        self._rank = {name: rank for rank, name in enumerate(self._table)}

    def is_split(self) -> bool:
        """Whether there are several devices, outside of `map_shards`."""
        return math.prod(self._shape.values()) > 1 and not jax.sharding.get_abstract_mesh().manual_axes

    def num_shards(self, name: str | None) -> int:
        return math.prod(self._sizes(name).values())

    def constrain(self, x: Array, axes: Axes) -> Array:
        wanted = [self._sizes(name) for name in axes]
        if not self.is_split():
            return x
        spec: list[Any] = [None] * x.ndim
        taken: set[str] = set()
        for position in sorted(range(x.ndim), key=lambda position: self._rank.get(axes[position] or "", -1)):
            sizes = wanted[position]
            if sizes and taken.isdisjoint(sizes):
                _check_divides(x.shape[position], axes[position], sizes)
                taken.update(sizes)
                spec[position] = tuple(sizes)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))

    def constrain_last(self, x: Array, last: Sequence[str | None]) -> Array:
        if not self.is_split():
            return x
        others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(last))
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*others, *self._spec(last)))

    def map_shards(
        self, fn: Callable[..., Any], in_axes: Any, out_axes: Any, reduce: str, check: bool
    ) -> Callable[..., Any] | None:
        sizes = self._sizes(reduce)
        if not sizes or not self.is_split():
            return None

        def mapped(*arguments: Any) -> Any:
            for argument, axes in zip(arguments, in_axes, strict=True):
                map_axes(self._check_shape, axes, argument)
            manual = jax.shard_map(
                functools.partial(fn, MeshShards(sizes)),
                in_specs=map_axes(self._spec, in_axes),
                out_specs=map_axes(self._spec, out_axes),
                check_vma=check,
            )
            return manual(*arguments)

        return mapped

    def without(self, name: str) -> "MeshPartition":
        self._check_known(name)
        return MeshPartition(self._shape, (self._table | {name: None}).items())

    def _sizes(self, name: str | None) -> dict[str, int]:
        """The mesh axes of size above 1 that a logical axis is split over, with their sizes."""
        if name is None:
            return {}
        self._check_known(name)
        return {axis: self._shape[axis] for axis in mesh_axes(self._table[name]) if self._shape[axis] > 1}

    def _check_known(self, name: str) -> None:
        if name not in self._table:
            known = sorted(self._table)
            raise ValueError(f"unknown logical axis {name!r}; known: {known}.{near_misses(name, known)}")

    def _spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        return PartitionSpec(*(tuple(self._sizes(name)) or None for name in axes))

    def _check_shape(self, axes: Axes, x: Array) -> None:
        for name, size in zip(axes, x.shape, strict=True):
            _check_divides(size, name, self._sizes(name))


def _check_divides(size: int, name: str | None, sizes: dict[str, int]) -> None:
    if size % math.prod(sizes.values()):
        given = {f"mesh.{axis}": n for axis, n in sizes.items()}
        fields = ", ".join([*FIELDS.get(name or "", ()), *given])
        what = "batch" if name == "copies" else name  # the same rows, split differently
        raise ValueError(
            f"{what}={size} is not divisible by {' * '.join(f'{k}={v}' for k, v in given.items())}; change {fields}"
        )
