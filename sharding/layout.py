"""Places the arrays of a run on a mesh by the logical names of their axes."""

import contextlib
import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lm2_jax import partition
from lm2_jax.errors import UserError
from lm2_jax.registry import near_misses
from lm2_jax.sharding.check import describe_replicated, replicated_arrays
from lm2_jax.sharding.partition import MeshPartition
from lm2_jax.sharding.rules import FIELDS, RULES, Rule, check_rules, mesh_axes
from lm2_jax.state import is_axes
from lm2_jax.types import Axes


class Layout:
    """A mesh and the table of rules that maps logical axes to it.

    A tree of axes has, in place of each array, the tuple of its dimensions' logical names, such as
    `("batch", "slots", None)`; None is a dimension that is never split.

    Nothing is replicated silently: a name that the table lacks, a dimension that does not divide, and two dimensions of
    one array on one mesh axis are errors. A mesh axis of size 1 divides every dimension.

    Args:
      mesh: with devices, or an abstract mesh for a plan.
      rules: the table.
      config: the run, so that messages can name the fields to change.
    """

    def __init__(self, mesh: Mesh | AbstractMesh, rules: Iterable[Rule] = RULES, config: Any = None):
        self.mesh: Any = mesh
        self._config = config
        self.rules = check_rules(rules)
        self._table = dict(self.rules)
        self._partition = MeshPartition(dict(self.mesh.shape), self.rules)
        self._rows = NamedSharding(self.mesh, self.spec(("batch",)))

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Makes this the active layout: inside the `with` block `lm2_jax.partition` refers to this mesh."""
        with jax.set_mesh(self.mesh), partition.use(self._partition):
            yield

    def spec(self, axes: Axes, path: str = "array") -> PartitionSpec:
        """The mesh axes of an array that exists between steps.

        Args:
          axes: logical names of its dimensions.
          path: its name in messages.
        Raises:
          UserError: a name that the table lacks, or two dimensions on one mesh axis.
        """
        taken: dict[str, str] = {}
        for name in axes:
            if name is None:
                continue
            if name not in self._table:
                known = sorted(self._table)
                raise UserError(
                    f"{path}: unknown logical axis {name!r} in {axes}; known: {known}.{near_misses(name, known)}"
                )
            for axis in self._split(name):
                if axis in taken:
                    raise UserError(
                        f"{path}: {taken[axis]!r} and {name!r} of {axes} both map to the mesh axis {axis!r}; "
                        "give one of the dimensions another name, or None."
                    )
                taken[axis] = name
        return PartitionSpec(*(None if name is None else self._table[name] for name in axes))

    def shardings(self, axes: Any, shapes: Any) -> Any:
        """The `NamedSharding` of each array of a tree.

        Args:
          axes: tree of axes.
          shapes: tree of arrays or `jax.ShapeDtypeStruct`s; the result has its structure.
        Raises:
          UserError: an unknown name, two dimensions on one mesh axis, or a dimension that does not divide.
          ValueError: trees of different structure, or another number of names than dimensions.
        """
        leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
        # jax treats the tuples of names as subtrees; flatten the tree of axes only down to the arrays of `shapes`.
        names = structure.flatten_up_to(axes)
        shardings = [
            self._sharding(jax.tree_util.keystr(path, simple=True, separator="/"), tuple(name), leaf.shape)
            for (path, leaf), name in zip(leaves, names, strict=True)
        ]
        return structure.unflatten(shardings)

    def check_used(self, axes: Any) -> None:
        """Refuses a mesh with an axis that shards nothing, whose devices would do the same work.

        Args:
          axes: tree of axes of all arrays of a run.
        Raises:
          UserError: a mesh axis of size above 1 that splits no array.
        """
        names = {name for leaf in jax.tree.leaves(axes, is_leaf=is_axes) for name in leaf}
        used = {axis for name in names for axis in self._split(name)}
        for axis, size in self.mesh.shape.items():
            if size > 1 and axis not in used:
                raise UserError(
                    f"mesh.{axis}={size}, but that axis splits no array of this run: its devices would all do the "
                    f"same work. Set mesh.{axis} to 1; axes in use: {sorted(used)}."
                )

    def replicated_arrays(self, arrays: Any) -> list[str]:
        """A line for each array of 1 MiB or more that is replicated although this mesh could split it, largest first.

        Args:
          arrays: tree of `jax.Array`s.
        """
        found = replicated_arrays(arrays, jax.tree.map(lambda array: array.sharding, arrays))
        return [describe_replicated(array) for array in sorted(found, key=lambda array: -array.bytes)]

    def batch(self, arrays: Any) -> Any:
        """Global arrays from this process's rows of a batch, split along the mesh axes of `batch`.

        Args:
          arrays: tree of host arrays whose first dimension has the rows of `rows_of_process`.
        Returns:
          The tree of `jax.Array`s with all rows.
        Raises:
          UserError: a number of rows that this process's devices do not divide.
        """
        # With one process this is an explicit transfer, which a transfer guard allows; with several, it is implicit.
        with jax.transfer_guard_host_to_device("allow"):
            return jax.tree.map(self._global, arrays)

    def rows_of_process(self, rows: int) -> tuple[int, int]:
        """The rows of a global batch that this process reads.

        Processes whose devices differ only along mesh axes that do not split the batch read the same rows.

        Args:
          rows: rows of the global batch.
        Returns:
          The first row, and the number of rows.
        Raises:
          UserError: the devices do not divide `rows`, or this process's rows are not contiguous.
        """
        self._check_rows("data.rows", rows, self._batch_shards())
        spans = self._spans(rows)
        first, last = spans[0][0], spans[-1][1]
        if sum(stop - start for start, stop in spans) != last - first:
            raise UserError(
                f"The rows of process {jax.process_index()} are not contiguous: {spans}. "
                "Make mesh.data * mesh.fsdp a multiple of the number of processes."
            )
        return first, last - first

    def _batch_shards(self) -> int:
        """Number of shards of a global batch."""
        return math.prod(self.mesh.shape[axis] for axis in self._split("batch"))

    def _spans(self, rows: int) -> list[tuple[int, int]]:
        """(first row, last row + 1) of each shard of a global batch on the devices of this process."""
        held = self._rows.addressable_devices_indices_map((rows,)).values()
        return sorted({index[0].indices(rows)[:2] for index in held if index is not None})

    def _global(self, rows: Any) -> jax.Array:
        rows = np.asarray(rows)
        held = len(self._spans(self._batch_shards()))
        self._check_rows("rows of this process", rows.shape[0], held)
        shape = (rows.shape[0] // held * self._batch_shards(), *rows.shape[1:])
        return jax.make_array_from_process_local_data(self._rows, rows, shape)

    def _check_rows(self, what: str, rows: int, shards: int) -> None:
        if rows < 1 or rows % shards:
            sizes = ", ".join(f"mesh.{axis}={self.mesh.shape[axis]}" for axis in self._split("batch"))
            raise UserError(
                f"{what}={rows} is not a positive multiple of {shards}, the batch shards of this mesh ({sizes}). "
                "Change data.rows or the mesh."
            )

    def _sharding(self, path: str, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
        if len(axes) != len(shape):
            raise ValueError(f"{path}: {len(axes)} logical axes {axes} for an array of shape {shape}")
        spec = self.spec(axes, path)
        for position, (name, size) in enumerate(zip(axes, shape, strict=True)):
            if size % math.prod(self.mesh.shape[axis] for axis in self._split(name)):
                sizes = {f"mesh.{axis}": self.mesh.shape[axis] for axis in self._split(name)}
                fields = self._fields(name, size)
                what = f"{fields[0]}={size}" if len(fields) == 1 else f"size {size}"
                raise UserError(
                    f"{what} is not divisible by {' * '.join(f'{k}={v}' for k, v in sizes.items())} (dimension "
                    f"{position}, {name!r}, of {path} {shape}); change {', '.join([*fields, *sizes])}."
                )
        return NamedSharding(self.mesh, spec)

    def _fields(self, name: str | None, size: int) -> list[str]:
        """Config fields that may have set a dimension's size: those of that value, if the run is known."""
        fields = FIELDS.get(name or "", ())
        values = {path: value for field in fields for path, value in _values(self._config, field).items()}
        return [path for path, value in values.items() if value == size] or list(values or fields)

    def _split(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes of a logical name."""
        return () if name is None else mesh_axes(self._table[name])


def _values(config: Any, field: str) -> dict[str, Any]:
    """The values of a field by path: at its own path in the config, and in each part of a mixed join."""
    parts = enumerate(getattr(config.model.join, "parts", ())) if config is not None else ()
    name = field.removeprefix("model.")
    owners = [(field, config, field), *((f"model.join.parts[{i}].{name}", part, name) for i, part in parts)]
    values = {}
    for path, owner, inside in owners:
        with contextlib.suppress(AttributeError):  # the field may be that of another memory
            values[path] = operator.attrgetter(inside)(owner)
    return values
