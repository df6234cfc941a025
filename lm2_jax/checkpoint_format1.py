"""Checkpoints of format 1: layers stacked as the model had them, names of state fields in the files."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from lm2_jax import checkpoint_storage, params
from lm2_jax.types import Array, PyTree


class Item(NamedTuple):
    """A tree of a checkpoint, before its checksums are compared."""

    saved: list[Array]  # in the order of their checksums
    tree: PyTree


def read_item(folder: epath.Path, name: str, like: PyTree) -> Item:
    """One item in the names and the grouping of `like`.

    Args:
      folder: of the checkpoint.
      name: of the item.
      like: tree of shapes with shardings.
    Raises:
      ValueError: its arrays are not those of `like`.
    """
    stored, empty = _stored(folder / name)
    if name == "memory":
        wanted = dict(zip(stored, jax.tree.leaves(like), strict=True))  # in the order of the state's fields
    else:
        wanted = _stacked(stored, params.to_canonical(like))
    nested = params.nest(wanted)
    target = _with_lists(params.nest({**wanted, **empty}))
    named = params.flatten(checkpoint_storage.load_arrays(folder / name, target))
    saved = [named[array] for array in stored]
    if name == "memory":
        return Item(saved, jax.tree.unflatten(jax.tree.structure(like), saved))
    arrays, theirs = params.to_canonical(params.nest(named)), list(params.to_canonical(nested))
    match = _match(theirs, list(params.to_canonical(like)))
    return Item(saved, params.from_canonical({ours: arrays[name] for ours, name in match.items()}, like))


def verified(name: str, item: Item, record: dict[str, Any]) -> PyTree:
    """The tree of an item, once its checksums are compared."""
    sums = [int(value) for value in jax.device_get(_bit_sums(item.saved))]
    if sums != record["checksums"][name]:
        raise ValueError(f"{name}: the arrays differ from those that were saved")
    return item.tree


def _stored(folder: epath.Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Names and shapes of the arrays in an item, in the order of the tree that was saved, and its empty places."""
    tree = json.loads((folder / "_METADATA").read_text())["tree_metadata"]
    arrays, empty = {}, {}
    for entry in tree.values():
        name, value = "/".join(key["key"] for key in entry["key_metadata"]), entry["value_metadata"]
        if value["skip_deserialize"]:
            empty[name] = None if value["value_type"] == "None" else {}
        else:
            arrays[name] = tuple(value["write_shape"])
    return arrays, empty


def _with_lists(nested: Any) -> Any:
    """Tables of numbered entries as lists, which tuples were saved as."""
    if not isinstance(nested, dict):
        return nested
    entries = {name: _with_lists(value) for name, value in nested.items()}
    if entries and set(entries) == {str(index) for index in range(len(entries))}:
        return [entries[str(index)] for index in range(len(entries))]
    return entries


def _stacked(stored: dict[str, tuple[int, ...]], canonical: dict[str, Any]) -> dict[str, Any]:
    """Shapes and shardings of what was stored, after those of single layers."""
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in stored.items()}
    entries = params.entries(params.nest(shapes))
    order = list(params.flatten(params.nest(shapes)))
    match = {theirs: ours for ours, theirs in _match([n for e in entries for n in e.names], list(canonical)).items()}
    wanted = {}
    for name, entry in zip(order, entries, strict=True):
        if entry.names[0] not in match:
            raise ValueError(f"{name}: this version has no such array")
        one = canonical[match[entry.names[0]]]
        sharding = params.with_layers(one.sharding) if entry.stacked else one.sharding
        shape = (stored[name][0], *one.shape) if entry.stacked else one.shape
        wanted[name] = jax.ShapeDtypeStruct(shape, one.dtype, sharding=sharding)
    return wanted


def _match(theirs: list[str], ours: list[str]) -> dict[str, str]:
    """Our name -> theirs: equal, or else equal without the numbers at its head, which count an optimizer's parts."""
    left, match = list(theirs), {}
    for key in (lambda name: name, _tail):
        for name in ours:
            found = None if name in match else next((other for other in left if key(other) == key(name)), None)
            if found is not None:
                match[name] = found
                left.remove(found)
    missing = [name for name in ours if name not in match]
    if missing:
        raise ValueError(f"it has no array {', '.join(missing[:3])}")
    return match


def _tail(name: str) -> str:
    parts = name.split("/")
    marks = [index for index, part in enumerate(parts) if part in ("mu", "nu", "count")]
    return "/".join(parts[marks[-1] :]) if marks else name


@jax.jit
def _bit_sums(arrays: list[Array]) -> list[Array]:
    def one(x: Array) -> Array:
        if x.dtype == bool:
            return jnp.sum(x, dtype=jnp.uint32)
        word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
        return jnp.sum(jax.lax.bitcast_convert_type(x, word), dtype=jnp.uint32)

    return [one(x) for x in arrays]
