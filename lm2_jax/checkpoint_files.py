"""One checkpoint on the disk: the names and checksums of its arrays, and its record."""

import contextlib
import fcntl
import functools
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from lm2_jax import checkpoint_format1, checkpoint_storage, formats, params
from lm2_jax.atomic import is_remote
from lm2_jax.errors import UserError
from lm2_jax.training.hosts import run_on_all_hosts
from lm2_jax.types import Array, PyTree

_SAFE = re.compile(r"[A-Za-z0-9 ./_+@=,:~-]*")  # Orbax passes paths to glob, TensorStore wants UTF-8
_FIRST_DESCRIPTOR = 500  # more files than any process of a job has open


@contextlib.contextmanager
def library_path(folder: epath.Path) -> Iterator[epath.Path]:
    """A path of an existing folder that Orbax and TensorStore can handle, whatever characters its own path has."""
    if is_remote(folder) or _SAFE.fullmatch(os.fspath(folder)):
        yield folder
        return
    opened = os.open(folder, os.O_RDONLY)
    try:  # the same number on all processes of a job: Orbax compares their paths
        descriptor = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, _FIRST_DESCRIPTOR)
    finally:
        os.close(opened)
    try:
        alias = f"/proc/self/fd/{descriptor}"
        if not os.path.isdir(alias):
            raise UserError(f"{folder}: this system needs a path of letters, digits and ./_-+@=,:~ only")
        yield epath.Path(alias)
    finally:
        os.close(descriptor)


def save(
    folder: epath.Path, items: dict[str, PyTree], record: dict[str, Any], config: dict[str, Any]
) -> ocp.AsyncResponse[None]:
    """Begins to write one checkpoint in the background, in place of one that is there; all processes must call this.

    Args:
      folder: of the checkpoint.
      items: trees by name, `params`, `opt_state` and perhaps `memory`.
      record: `record_of`.
      config: of the run, as JSON types.
    Returns:
      What waits until the checkpoint is complete.
    """
    trees = {name: params.nest(_named(name, tree)) for name, tree in items.items()}
    return checkpoint_storage.save(folder, trees, {"position": record, "config": config})


def record_of(sums: dict[str, dict[str, int]], config: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The record of a checkpoint, sealed by a hash of itself.

    Args:
      sums: `checksums` of its items.
      config: of the run; its hash is recorded.
      **values: step, first loss and what else belongs to it.
    """
    record = {**formats.stamp(), **values, "config": formats.digest(config), "checksums": sums}
    return {**record, "seal": formats.digest(record)}


def read_record(folder: epath.Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of one checkpoint and the config that it was trained with.

    Args:
      folder: of all checkpoints.
      step: which; the record must say the same.
    Raises:
      ValueError: it is damaged; or whatever Orbax raises.
      UserError: its format is too new.
    """
    record, config = (checkpoint_storage.load_table(folder / str(step) / item) for item in ("position", "config"))
    if not isinstance(record, dict):
        raise ValueError("position: expected a table")
    if formats.check_format(record, f"checkpoint {folder / str(step)}") > 1:
        sealed = dict(record)
        if sealed.pop("seal", None) != formats.digest(sealed):
            raise ValueError("position: it differs from what was saved")
        if record["config"] != formats.digest(config):
            raise ValueError("config: it differs from what was saved")
    if record["step"] != step:
        raise ValueError(f"it was saved as step {record['step']}; its folder was renamed")
    return record, config  # pyright: ignore[reportReturnType]


def read_items(folder: epath.Path, step: int, wanted: dict[str, PyTree]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trees of one checkpoint, verified by their checksums, and its record; on all processes or on none.

    Args:
      folder: of all checkpoints.
      step: which.
      wanted: trees of shapes with shardings, by item name.
    Raises:
      ValueError: what is read is not what was written; or whatever Orbax raises over a damaged file.
      UserError: it could be read here, but not on another process.
    """

    def read() -> tuple[dict[str, Any], dict[str, Any]]:
        record, _ = read_record(folder, step)
        reader = checkpoint_format1.read_item if record.get("format", 1) == 1 else _read_item
        return {name: reader(folder / str(step), name, tree) for name, tree in wanted.items()}, record

    items, record = run_on_all_hosts(read)
    if record.get("format", 1) == 1:
        items = {name: checkpoint_format1.verified(name, item, record) for name, item in items.items()}
        return items, record
    sums, _ = checksums(items)
    for name, values in sums.items():
        wrong = [array for array, value in values.items() if record["checksums"][name].get(array) != value]
        if wrong:
            raise ValueError(f"{name}: {', '.join(wrong[:3])} differ from what was saved")
    return items, record


def confirm(folder: epath.Path, step: int) -> None:
    """Reads a checkpoint's record, config and one of its parameters back, on this process alone.

    Of the other arrays it only sees whether the folder of their item is there.

    Raises:
      Exception: something is not as it was saved.
    """
    record, _ = read_record(folder, step)
    if record.get("format", 1) == 1:
        return
    for item in record["checksums"]:
        if not (folder / str(step) / item).exists():
            raise ValueError(f"{item}: missing")
    sums = record["checksums"]["params"]
    name = sorted(sums)[step % len(sums)]  # another one each time
    wanted = params.nest({name: np.ndarray})
    array = params.flatten(checkpoint_storage.load_arrays(folder / str(step) / "params", wanted, partial=True))[name]
    if _host_checksum(np.asarray(array)) != sums[name]:
        raise ValueError(f"params: {name} differs from what was saved")


def checksums(items: dict[str, PyTree]) -> tuple[dict[str, dict[str, int]], bool]:
    """Checksums by item and array name, and whether everything is finite."""
    sums, finite = jax.device_get(_inspect(items))
    return {
        name: {
            array: int(value)
            for entry, values in zip(_entries(name, tree), sums[name], strict=True)
            for array, value in zip(entry.names, np.atleast_1d(values), strict=True)
        }
        for name, tree in items.items()
    }, bool(finite)


def brief(error: BaseException) -> str:
    """The cause of an exception in one line that fits a message."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r" \[(tensorstore_spec|os_error_code|source_locations)=.*", "", lines[0])
    if len(text) > 200:  # TensorStore names layer after layer; the system's own words come last
        text = text.rsplit('": ', 1)[-1]
    return f"{type(error).__name__}: {text[:300]}"


def _read_item(folder: epath.Path, name: str, like: PyTree) -> PyTree:
    wanted = params.nest(_named(name, like))
    if not wanted:
        return like
    named = params.flatten(checkpoint_storage.load_arrays(folder / name, wanted))
    if name == "memory":
        return jax.tree.unflatten(jax.tree.structure(like), [named[str(i)] for i in range(len(named))])
    return params.from_canonical(named, like)


def _named(name: str, tree: PyTree) -> dict[str, Any]:
    """Arrays by name; those of the memory are numbered, so that renaming a field of a state changes no file."""
    if name == "memory":
        return {str(index): leaf for index, leaf in enumerate(jax.tree.leaves(tree))}
    return params.to_canonical(tree)


def _entries(name: str, tree: PyTree) -> list[params.Entry]:
    if name == "memory":
        return [params.Entry((str(index),), False) for index in range(len(jax.tree.leaves(tree)))]
    return params.entries(tree)


@jax.jit
def _inspect(items: dict[str, PyTree]) -> tuple[dict[str, list[Array]], Array]:
    """Per item the checksums of its arrays, and whether everything is finite; no file has to be read again."""
    leaves = [leaf for leaf in jax.tree.leaves(items) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    finite = functools.reduce(jnp.logical_and, (jnp.all(jnp.isfinite(leaf)) for leaf in leaves), jnp.array(True))
    return {
        name: [
            _checksum(leaf, entry.stacked)
            for entry, leaf in zip(_entries(name, tree), jax.tree.leaves(tree), strict=True)
        ]
        for name, tree in items.items()
    }, finite


def _checksum(x: Array, stacked: bool) -> Array:
    """Sum of an array's bits modulo 2^32, each word times an odd number that depends on its place.

    Any change of one value shows, and so do values that change places; the sum does not depend on the sharding. A
    stacked array has one checksum for each layer.
    """
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)
    first = 1 if stacked else 0
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(first, words.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    place = place * jnp.uint32(0x9E3779B1)
    place = (place ^ (place >> 15)) * jnp.uint32(0x85EBCA77)
    return jnp.sum(
        words * (place ^ (place >> 13) | jnp.uint32(1)), axis=tuple(range(first, words.ndim)), dtype=jnp.uint32
    )


def _host_checksum(x: np.ndarray) -> int:
    """`_checksum` of an array that is not stacked, without a device."""
    word = np.uint8 if x.dtype == bool else np.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    words = np.ascontiguousarray(x).reshape(-1).view(word).astype(np.uint32)
    place = np.arange(words.size, dtype=np.uint32) * np.uint32(0x9E3779B1)
    place = (place ^ (place >> np.uint32(15))) * np.uint32(0x85EBCA77)
    return int(np.sum(words * (place ^ (place >> np.uint32(13)) | np.uint32(1)), dtype=np.uint32))
