"""Names of parameters that do not depend on how equal blocks are grouped.

In memory, consecutive equal blocks are stacked: `blocks_2/attention/q/w` holds layers 2, 3, ... on its first axis, and
which layers share a group depends on which of them have a memory. In checkpoints every layer has its own arrays:
`layers/2/attention/q/w`, `layers/3/attention/q/w`. The same holds for an optimizer's moments, whose trees contain the
parameters' tree: `1/mu/layers/2/attention/q/w`.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm2_jax.errors import UserError
from lm2_jax.types import Array, PyTree

LAYERS = "layers"
_GROUP = re.compile(r"blocks_(\d+)")  # of equal blocks; the number is the first layer


class Entry(NamedTuple):
    """The names of one array of a tree: one for each layer where layers are stacked on its first axis, else one."""

    names: tuple[str, ...]
    stacked: bool


class Loaded(NamedTuple):
    """Parameters of a model, some of them from another one."""

    params: PyTree
    taken: list[str]
    missing: list[str]  # the model has them, the source does not: they keep their initial values
    unused: list[str]  # the source has them, the model does not

    def report(self, source: str) -> str:
        """What was taken from `source`, in a few lines."""
        lines = [f"{len(self.taken)} arrays taken from {source}"]
        for names, what in ((self.missing, "keep their initial values"), (self.unused, "are not used")):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"  {len(names)} {what}: {', '.join(names[:5])}{more}")
        return "\n".join(lines)


def entries(tree: PyTree) -> list[Entry]:
    """The canonical names of a tree's arrays, in the order of its leaves.

    Args:
      tree: arrays or shapes; parameters, or an optimizer state that contains trees like them.
    """
    return [_entry(_path_names(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def to_canonical(tree: PyTree) -> dict[str, Any]:
    """The arrays of a tree by canonical name, one for each layer.

    Args:
      tree: arrays, or shapes with or without shardings. Slices keep the sharding of the dimensions they have.
    """
    return {name: part for entry, leaf in zip(entries(tree), jax.tree.leaves(tree), strict=True)
            for name, part in zip(entry.names, _parts(entry, leaf), strict=True)}  # fmt: skip


def from_canonical(named: Mapping[str, Any], like: PyTree) -> PyTree:
    """The tree whose arrays `to_canonical` named.

    Args:
      named: arrays by canonical name; more than needed may be there.
      like: tree of shapes or arrays; it says how layers are grouped, and the sharding of the result.
    Raises:
      KeyError: an array is missing.
    """
    leaves = [_joined(entry, [named[name] for name in entry.names], leaf)
              for entry, leaf in zip(entries(like), jax.tree.leaves(like), strict=True)]  # fmt: skip
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def load_by_name(named: Mapping[str, Array], params: PyTree) -> Loaded:
    """Replaces parameters by those of the same canonical name, as far as there are any.

    So a decoder's weights go into a model with another memory, with one in other layers, or with none.

    Args:
      named: arrays of another model, see `to_canonical`.
      params: initial parameters; they say what is kept, and types and shardings.
    Raises:
      UserError: an array of the same name has another shape.
    """
    found = entries(params)
    names = [name for entry in found for name in entry.names]
    shapes = {name: tuple(part.shape) for name, part in to_canonical(jax.eval_shape(lambda: params)).items()}
    wrong = [
        f"  {name}: {tuple(named[name].shape)} there, {shapes[name]} here"
        for name in names
        if name in named and tuple(named[name].shape) != shapes[name]
    ]
    if wrong:
        raise UserError(
            "parameters of the same name have other shapes; set the model's fields as they are there:\n"
            + "\n".join(wrong[:10] + [f"  and {len(wrong) - 10} more"] * (len(wrong) > 10)),
            status=1,
        )
    leaves = []
    for entry, leaf in zip(found, jax.tree.leaves(params), strict=True):
        if any(name in named for name in entry.names):
            parts = [
                jax.device_put(named[name].astype(part.dtype), part.sharding) if name in named else part
                for name, part in zip(entry.names, _parts(entry, leaf), strict=True)
            ]
            leaf = _joined(entry, parts, leaf)
        leaves.append(leaf)
    return Loaded(
        jax.tree.unflatten(jax.tree.structure(params), leaves),
        [name for name in names if name in named],
        [name for name in names if name not in named],
        [name for name in named if name not in shapes],
    )


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": x}` as `{"a": {"b": x}}`."""
    nested: dict[str, Any] = {}
    for name, leaf in named.items():
        *folders, last = name.split("/")
        table = nested
        for folder in folders:
            table = table.setdefault(folder, {})
        table[last] = leaf
    return nested


def flatten(nested: PyTree) -> dict[str, Any]:
    """The inverse of `nest`; lists count as tables of numbered entries."""
    return {"/".join(_path_names(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(nested)}


def _path_names(path: Sequence[Any]) -> list[str]:
    return [jax.tree_util.keystr((key,), simple=True) for key in path]


def _entry(names: list[str], leaf: Any) -> Entry:
    for place, name in enumerate(names):
        group = _GROUP.fullmatch(name)
        if group is None:
            continue
        if not leaf.ndim:
            raise ValueError(f"{'/'.join(names)}: expected an array with a layers axis, got a single number")
        layers = [str(int(group[1]) + index) for index in range(leaf.shape[0])]
        return Entry(tuple("/".join([*names[:place], LAYERS, layer, *names[place + 1 :]]) for layer in layers), True)
    return Entry(("/".join(names),), False)


def _parts(entry: Entry, leaf: Any) -> list[Any]:
    """The array of each name."""
    if not entry.stacked:
        return [leaf]
    if isinstance(leaf, jax.ShapeDtypeStruct):
        part = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=without_layers(leaf.sharding))
        return [part] * len(entry.names)
    if isinstance(leaf, jax.Array):
        return [_slicer(without_layers(leaf.sharding))(leaf, np.int32(index)) for index in range(leaf.shape[0])]
    return list(leaf)


def _joined(entry: Entry, parts: list[Any], like: Any) -> Any:
    """The stacked array of all names, with the sharding of `like`."""
    if not entry.stacked:
        return parts[0]
    sharding = getattr(like, "sharding", None)
    if sharding is None or not all(isinstance(part, jax.Array) for part in parts):
        return np.stack([np.asarray(part) for part in parts])
    # Shard by shard, through the host: no program is compiled, and no device ever holds more than its shard.
    shards = [{shard.device: shard.data for shard in part.addressable_shards} for part in parts]
    made: dict[str, np.ndarray] = {}
    pieces = []
    for device, index in sharding.addressable_devices_indices_map(like.shape).items():
        if str(index) not in made:
            layers = range(*index[0].indices(len(parts)))
            made[str(index)] = np.stack([np.asarray(shards[layer][device]) for layer in layers])
        pieces.append(jax.device_put(made[str(index)], device))
    return jax.make_array_from_single_device_arrays(like.shape, sharding, pieces)


def without_layers(sharding: Any) -> Any:
    """The sharding of one layer of a stacked array."""
    return _with_spec(sharding, lambda spec: spec[1:])


def with_layers(sharding: Any) -> Any:
    """The sharding of a stacked array whose layers have this one; its first axis is not split."""
    return _with_spec(sharding, lambda spec: (None, *spec))


def _with_spec(sharding: Any, change: Callable[[tuple], tuple]) -> Any:
    """A sharding with other dimensions; that of a single device names none and stays."""
    if not hasattr(sharding, "spec"):
        return sharding
    return type(sharding)(sharding.mesh, type(sharding.spec)(*change(tuple(sharding.spec))))


@functools.cache
def _slicer(sharding: Any) -> Any:
    """One layer of a stacked array; one program for all layers."""
    return jax.jit(lambda x, index: jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False), out_shardings=sharding)
