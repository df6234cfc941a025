"""Places arrays on a mesh by the names of their axes: the `lm2_jax.layout.Layout` of training and evaluation."""

import contextlib
import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lm2_jax import layout, partition
from lm2_jax.errors import UserError
from lm2_jax.registry import near_misses
from lm2_jax.sharding.check import describe_whole, unsharded
from lm2_jax.sharding.partition import MeshPartition
from lm2_jax.sharding.rules import FIELDS, RULES, Rule, check_rules, mesh_axes
from lm2_jax.state import is_axes
from lm2_jax.types import Axes


class Layout(layout.Layout):
    """A mesh and the table that maps logical axes to it.

    Nothing is replicated in silence: a name without a row, a dimension that does not divide, or two dimensions of
    one array on one mesh axis is an error. A mesh axis of size 1 splits nothing and so divides everything.

    Args:
      mesh: with devices, or without for a plan.
      rules: the table.
      config: a run, whose fields messages then name.
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
        """Inside it, `constrain` and other logical names mean this mesh."""
        with jax.set_mesh(self.mesh), partition.use(self._partition):
            yield

    def spec(self, axes: Axes, path: str = "array") -> PartitionSpec:
        """Mesh axes of an array that outlives a step.

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
                        f"{path}: {taken[axis]!r} and {name!r} of {axes} both lie on the mesh axis {axis!r}; "
                        "name one of the dimensions otherwise, or None."
                    )
                taken[axis] = name
        return PartitionSpec(*(None if name is None else self._table[name] for name in axes))

    def shardings(self, axes: Any, shapes: Any) -> Any:
        """The `NamedSharding` of each array of a tree.

        Args:
          axes: tree with a tuple of logical names in the place of each array.
          shapes: tree of arrays or `jax.ShapeDtypeStruct`s; the result has its structure.
        Raises:
          UserError: an unknown name, two dimensions on one mesh axis, or a dimension that does not divide.
          ValueError: trees of different structure, or as many names as there are no dimensions.
        """
        leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
        # Axes are tuples, which jax takes for subtrees: cut their tree where `shapes` has its arrays.
        names = structure.flatten_up_to(axes)
        placed = [
            self._sharding(jax.tree_util.keystr(path, simple=True, separator="/"), tuple(name), leaf.shape)
            for (path, leaf), name in zip(leaves, names, strict=True)
        ]
        return structure.unflatten(placed)

    def check_used(self, axes: Any) -> None:
        """Refuses a mesh whose devices would do the same work twice.

        Args:
          axes: tree of the logical axes of all arrays of a run.
        Raises:
          UserError: a mesh axis of size above 1 on which no array lies.
        """
        names = {name for leaf in jax.tree.leaves(axes, is_leaf=is_axes) for name in leaf}
        used = {axis for name in names for axis in self._split(name)}
        for axis, size in self.mesh.shape.items():
            if size > 1 and axis not in used:
                raise UserError(
                    f"mesh.{axis}={size}, but no array of this run lies on that axis: its devices would all do the "
                    f"same. Set mesh.{axis} to 1; axes in use: {sorted(used)}."
                )

    def left_whole(self, arrays: Any) -> list[str]:
        """Arrays of a mebibyte or more that every device holds whole though this mesh could split them, largest first.

        Args:
          arrays: tree of arrays where they lie.
        """
        whole = unsharded(arrays, jax.tree.map(lambda array: array.sharding, arrays))
        return [describe_whole(array) for array in sorted(whole, key=lambda array: -array.bytes)]

    def batch(self, arrays: Any) -> Any:
        """Global arrays from this process's rows of a batch, split over the devices that `batch` names.

        Args:
          arrays: tree of host arrays, all with the rows of `rows_of_process` first.
        Raises:
          UserError: a number of rows that this process's devices do not divide.
        """
        # For one process this is a `device_put`, which a guard lets pass as meant; for several, jax does not say so.
        with jax.transfer_guard_host_to_device("allow"):
            return jax.tree.map(self._global, arrays)

    def rows_of_process(self, rows: int) -> tuple[int, int]:
        """First row and number of rows that this process reads of a global batch of `rows`.

        Processes that share rows, because their devices differ only along other mesh axes, get the same answer.

        Raises:
          UserError: `rows` do not divide over the devices, or this process's rows are not in one piece.
        """
        self._check_rows("data.rows", rows, self._pieces())
        spans = self._spans(rows)
        first, last = spans[0][0], spans[-1][1]
        if sum(stop - start for start, stop in spans) != last - first:
            raise UserError(
                f"The rows of process {jax.process_index()} are not in one piece: {spans}. "
                "Make mesh.data * mesh.fsdp a multiple of the number of processes."
            )
        return first, last - first

    def _pieces(self) -> int:
        """Pieces that the global batch is cut into."""
        return math.prod(self.mesh.shape[axis] for axis in self._split("batch"))

    def _spans(self, rows: int) -> list[tuple[int, int]]:
        """(first, last + 1) of each piece of a global batch that a device of this process holds."""
        held = self._rows.addressable_devices_indices_map((rows,)).values()
        return sorted({index[0].indices(rows)[:2] for index in held if index is not None})

    def _global(self, rows: Any) -> jax.Array:
        rows = np.asarray(rows)
        held = len(self._spans(self._pieces()))
        self._check_rows("rows of this process", rows.shape[0], held)
        whole = (rows.shape[0] // held * self._pieces(), *rows.shape[1:])
        return jax.make_array_from_process_local_data(self._rows, rows, whole)

    def _check_rows(self, what: str, rows: int, pieces: int) -> None:
        if rows < 1 or rows % pieces:
            sizes = ", ".join(f"mesh.{axis}={self.mesh.shape[axis]}" for axis in self._split("batch"))
            raise UserError(
                f"{what}={rows} is not a positive multiple of {pieces}, the pieces of a batch on this mesh ({sizes}). "
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
        """Fields of the run that may have set a dimension's size: those of that value, if the run is known."""
        fields = FIELDS.get(name or "", ())
        values = {path: value for field in fields for path, value in _values(self._config, field).items()}
        return [path for path, value in values.items() if value == size] or list(values or fields)

    def _split(self, name: str | None) -> tuple[str, ...]:
        """Mesh axes of one logical name."""
        return () if name is None else mesh_axes(self._table[name])


def _values(config: Any, field: str) -> dict[str, Any]:
    """The values of a field by their paths in the config: as it is named, and in each part of a mixed join."""
    parts = enumerate(getattr(config.model.join, "parts", ())) if config is not None else ()
    name = field.removeprefix("model.")
    owners = [(field, config, field), *((f"model.join.parts[{i}].{name}", part, name) for i, part in parts)]
    values = {}
    for path, owner, inside in owners:
        with contextlib.suppress(AttributeError):  # other memories have other fields
            values[path] = operator.attrgetter(inside)(owner)
    return values
