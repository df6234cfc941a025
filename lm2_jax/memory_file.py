"""Memory files: what a model remembers of a text, as one safetensors file; inspect, diff, export and merge.

python -m lm2_jax.memory_file inspect book.memory
python -m lm2_jax.memory_file diff before.memory after.memory
python -m lm2_jax.memory_file export book.memory --out book.npz
python -m lm2_jax.memory_file merge a.memory b.memory --workdir runs/W --out both.memory

The file holds arrays and one JSON text of metadata; reading it runs no code. `tensors` of the metadata names the axes
of each array. The same text read by the same model gives the same bytes.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import save as to_safetensors

from lm2_jax import atomic, cli
from lm2_jax.arguments import ArgumentParser
from lm2_jax.errors import UserError
from lm2_jax.folders import check_file, prepare_file
from lm2_jax.inference.merging import merge as merge
from lm2_jax.inference.snapshot import MemorySnapshot, Source, empty_memory, model_fingerprint
from lm2_jax.state import map_axes

if TYPE_CHECKING:
    from lm2_jax.runs import Run

FORMAT = 1
METADATA = "lm2_memory"  # the only key of the file's metadata, so that equal memories give equal bytes
_LOGITS, _OPEN = "logits", "open_tokens"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
_DTYPES |= {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


class MemoryFile(NamedTuple):
    """A memory file, apart from any model."""

    metadata: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def states(self) -> dict[str, np.ndarray]:
        """The floating-point arrays of the recurrent state."""
        floats = {name: array for name, array in self.arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}
        return {name: array for name, array in floats.items() if name != _LOGITS}

    def layers(self, name: str) -> list[tuple[str, np.ndarray]]:
        """An array layer by layer, without the axis of the one row."""
        axes, array = self.metadata["tensors"][name], self.arrays[name]
        array = np.squeeze(array, axes.index("batch"))
        if "layers" not in axes:
            return [(name, array)]
        return [(f"{name} [layer {i}]" if len(array) > 1 else name, layer) for i, layer in enumerate(array)]


def save(memory: MemorySnapshot, path: epath.PathLike) -> None:
    """Writes a memory file, all of it or nothing.

    Raises:
      UserError: the file cannot be written; what was there stays.
    """
    place = prepare_file(path, "memory file")
    try:
        atomic.write_file(place, encode(memory))
    except OSError as error:
        raise UserError(f"memory file {path}: cannot be written: {error}", status=1) from error


def encode(memory: MemorySnapshot, fingerprint: str | None = None) -> bytes:
    """The content of a memory file.

    Args:
      memory: what to write.
      fingerprint: of its model, where it is known.
    """
    run = memory.run
    arrays = {name: np.asarray(leaf) for name, leaf in _named(memory.state).items()}
    arrays |= {_LOGITS: np.asarray(memory.logits_V), _OPEN: np.asarray(memory.open_tokens, np.int32)}
    axes = _named(map_axes(lambda names, leaf: _Axes(names), run.model.state_axes(), memory.state))
    metadata = {
        "format": FORMAT,
        "preset": run.config.name,
        "step": int(run.step),
        "model": fingerprint or model_fingerprint(run),
        "tokenizer": run.tokenizer.fingerprint,
        "segment_tokens": run.config.model.segment_tokens,
        "tokens_read": memory.tokens_read,
        "position": memory.position,
        "sources": [dataclasses.asdict(source) for source in memory.sources],
        "tensors": {name: list(axes[name].names) for name in sorted(axes)},
        "content": _content_hash(arrays),
    }
    if memory.merged_from:
        metadata["merged_from"] = list(memory.merged_from)
    return to_safetensors(arrays, {METADATA: json.dumps(metadata)})


def read_memory_file(path: epath.PathLike) -> MemoryFile:
    """Reads and checks a memory file.

    Raises:
      UserError: no such file, or one that is no undamaged memory file of this version.
    """
    place = epath.Path(path)
    try:
        if place.is_dir():
            raise UserError(f"memory file {path}: expected a file, this is a folder")
        if not place.exists():
            raise UserError(f"memory file {path}: no such file; --save-memory or memory.save(path) write one")
        content = place.read_bytes()
    except OSError as error:
        raise UserError(f"memory file {path}: cannot be read: {error}", status=1) from error
    if not content:
        _refuse(path, "the file is empty")
    try:
        tensors = safetensors.deserialize(content)
    except SafetensorError as error:
        _refuse(path, f"it is no safetensors file, or it is damaged or truncated ({error})")
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    try:
        metadata = json.loads(header["__metadata__"][METADATA])
        version = metadata["format"]
    except (KeyError, TypeError, ValueError):
        _refuse(path, "it is a safetensors file of something else")
    if version != FORMAT:
        _refuse(path, f"it has format {version!r}, and this version reads format {FORMAT}")
    try:
        arrays = {name: _array(tensor) for name, tensor in tensors}
        damaged = metadata["content"] != _content_hash(arrays)
        file = MemoryFile(_checked(metadata, arrays), arrays)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        _refuse(path, f"its metadata are damaged ({type(error).__name__}: {error})")
    if damaged:
        _refuse(path, "its arrays were changed or damaged")
    return file


def load_memory(path: epath.PathLike, run: "Run") -> MemorySnapshot:
    """The memory that a file holds, for the model and tokenizer that made it.

    Args:
      path: of a memory file.
      run: the model that uses it.
    Raises:
      UserError: as `read_memory_file`; or the file is of another model or tokenizer.
    """
    file = read_memory_file(path)
    found = file.metadata
    if found["model"] != model_fingerprint(run):
        raise UserError(
            f"memory file {path}: made by another model (preset {found['preset']!r}, step {found['step']}) than this "
            f"one (preset {run.config.name!r}, step {run.step}); use the workdir and checkpoint that made it, or read "
            "the text again",
            status=1,
        )
    if found["tokenizer"] != run.tokenizer.fingerprint:
        raise UserError(
            f"memory file {path}: made with the tokenizer {found['tokenizer']}, this run has "
            f"{run.tokenizer.fingerprint}; use the workdir that made it, or read the text again",
            status=1,
        )
    empty = empty_memory(run)
    expected = _named(empty.state) | {_LOGITS: empty.logits_V}
    for name, leaf in expected.items():
        array = file.arrays.get(name)
        if array is None or array.shape != leaf.shape or array.dtype != leaf.dtype:
            _refuse(path, f"the array {name} does not have the shape and type that this model's memory has")
    leaves = [jnp.asarray(file.arrays[name]) for name in _named(empty.state)]
    return MemorySnapshot(
        run,
        jax.tree.unflatten(jax.tree.structure(empty.state), leaves),
        file.arrays[_LOGITS],
        file.arrays[_OPEN],
        found["tokens_read"],
        tuple(Source(**source) for source in found["sources"]),
        tuple(found.get("merged_from", ())),
    )


def merge_files(paths: Sequence[epath.PathLike], workdir: epath.PathLike, out: epath.PathLike) -> None:
    """Writes the memory that `merge` makes of memory files.

    Args:
      paths: the memory files.
      workdir: of the run that made them.
      out: the file to write, which must not exist yet.
    Raises:
      UserError: as `load_run`, `load_memory` and `merge`; or `out` exists or cannot be written.
    """
    from lm2_jax.runs import load_run

    if check_file(out, "--out").exists():
        raise UserError(f"--out {out} exists and is not overwritten; choose another file or remove it first")
    for path in paths:
        read_memory_file(path)
    run = load_run(workdir)
    merge(run, [load_memory(path, run) for path in paths]).save(out)


class _Axes(NamedTuple):
    """Axis names of one array; a class of its own, so that a tree does not take the names for leaves."""

    names: tuple[str | None, ...]


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a state by their path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, _Axes))
    return {"state/" + jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _array(tensor: dict[str, Any]) -> np.ndarray:
    dtype = jnp.dtype(_DTYPES[tensor["dtype"]])
    return np.frombuffer(bytes(tensor["data"]), dtype).reshape(tensor["shape"])


def _content_hash(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {list(array.shape)}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _checked(metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The metadata, if every field has its type; a TypeError or KeyError names the first that has not."""
    types = {"preset": str, "step": int, "model": str, "tokenizer": str, "segment_tokens": int, "tokens_read": int}
    for name, kind in (types | {"position": int, "sources": list, "tensors": dict}).items():
        if not isinstance(metadata[name], kind):
            raise TypeError(f"{name} is {metadata[name]!r}")
    for source in metadata["sources"]:
        Source(**source)
    counts = metadata.get("merged_from", [])
    if any(type(count) is not int or count < 1 for count in counts) or sum(counts) > len(metadata["sources"]):
        raise ValueError(f"merged_from is {counts!r}")
    if arrays[_OPEN].shape != (metadata["position"],) or arrays[_OPEN].dtype != np.int32:
        raise ValueError(f"{_OPEN} does not have {metadata['position']} tokens")
    for name, axes in metadata["tensors"].items():
        if arrays[name].ndim != len(axes) or "batch" not in axes:
            raise ValueError(f"tensors.{name} does not name the axes of the array")
    if set(arrays) != {*metadata["tensors"], _LOGITS, _OPEN}:
        raise ValueError("tensors does not name the arrays of the file")
    return metadata


def _refuse(path: epath.PathLike, reason: str) -> NoReturn:
    raise UserError(
        f"memory file {path}: expected a memory file of lm2_jax, format {FORMAT}, but {reason}. Read the text again "
        f"with {cli.program('generate')} --read TEXT --save-memory FILE",
        status=1,
    )


def effective_rank(matrix: np.ndarray) -> float:
    """exp of the entropy of the singular values' shares; 0 for a matrix of zeros (Roy and Vetterli, 2007)."""
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    if not values.sum():
        return 0.0
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def describe(file: MemoryFile) -> str:
    """What a memory file holds, as text."""
    m = file.metadata
    size = sum(array.nbytes for array in file.arrays.values())
    floats = sum(array.size for array in file.states.values())
    lines = [
        f"preset {m['preset']}, step {m['step']}, model {m['model'][:12]}, tokenizer {m['tokenizer']}",
        f"{m['tokens_read']:,} tokens read: {m['tokens_read'] // m['segment_tokens']:,} segments of "
        f"{m['segment_tokens']} and {m['position']} tokens of the next",
        f"{size:,} bytes, {floats:,} values of memory",
        "",
        "read:",
    ]
    if merged := m.get("merged_from"):
        lines[-2:-1] = [f"merged from memories of {' and '.join(map(str, merged))} texts", ""]
    for source in (Source(**source) for source in m["sources"]):
        part = "" if source.is_complete else ", unfinished"
        changed = f", file of {source.modified}" if source.modified else ""
        lines.append(f"  {source.name}: {source.tokens:,} tokens{part}, sha256 {(source.sha256 or '-')[:12]}{changed}")
    lines += ["", f"{'array':<44} {'shape':>16} {'norm':>10} {'rank':>6}  slots in use"]
    for name in sorted(file.states):
        axes = m["tensors"][name]
        for label, array in file.layers(name):
            matrices = array.reshape(-1, *array.shape[-2:]) if array.ndim >= 2 else array.reshape(0, 1, 1)
            rank = f"{np.mean([effective_rank(matrix) for matrix in matrices]):.1f}" if len(matrices) else "-"
            shape = "x".join(map(str, array.shape))
            norm = float(np.linalg.norm(array.astype(np.float64)))
            lines.append(
                f"{label.removeprefix('state/'):<44} {shape:>16} {norm:>10.4g} {rank:>6}  {_usage(axes, array)}"
            )
    return "\n".join(lines)


def _usage(axes: Sequence[str | None], array: np.ndarray) -> str:
    """How many slots have at least a tenth of the largest slot's norm."""
    left = [name for name in axes if name not in ("batch", "layers")]
    if "slots" not in left:
        return "-"
    slots = np.moveaxis(array.astype(np.float64), left.index("slots"), 0)
    norms = np.linalg.norm(slots.reshape(len(slots), -1), axis=1)
    return f"{int((norms > norms.max() / 10).sum())} of {len(norms)}"


def compare(a: MemoryFile, b: MemoryFile) -> str:
    """How two memory files differ, as text."""
    lines = []
    for name in ("preset", "step", "model", "tokenizer", "tokens_read", "position", "merged_from"):
        found = [file.metadata.get(name, "-") for file in (a, b)]
        if found[0] != found[1]:
            lines.append(f"{name}: {found[0]} and {found[1]}")
    sources = [[(source["sha256"], source["tokens"]) for source in file.metadata["sources"]] for file in (a, b)]
    if sources[0] != sources[1]:
        names = [", ".join(source["name"] for source in file.metadata["sources"]) or "nothing" for file in (a, b)]
        lines.append(f"read: {names[0]} and {names[1]}")
    for name in sorted(a.states.keys() | b.states.keys()):
        if name not in a.states or name not in b.states or a.states[name].shape != b.states[name].shape:
            lines.append(f"{name}: not in both files with the same shape")
            continue
        for (label, x), (_, y) in zip(a.layers(name), b.layers(name), strict=True):
            if x.tobytes() != y.tobytes():
                x, y = x.astype(np.float64), y.astype(np.float64)
                norms = np.linalg.norm(x), np.linalg.norm(y)
                cosine = f"{(x * y).sum() / (norms[0] * norms[1]):.4f}" if min(norms) else "-"
                change = f"{np.linalg.norm(x - y):.4g}"
                lines.append(f"{label}: norms {norms[0]:.4g} and {norms[1]:.4g}, distance {change}, cosine {cosine}")
    same = all(a.arrays[name].tobytes() == b.arrays[name].tobytes() for name in (_LOGITS, _OPEN))
    if not lines and same:
        return "the memories are equal bit for bit"
    return "\n".join(lines or ["only the tokens since the last segment border differ"])


def export(file: MemoryFile, out: epath.PathLike) -> None:
    """Writes all arrays as a .npz file, bfloat16 as float32, and the metadata as the JSON text `metadata` in it."""
    arrays = {
        name: array.astype(np.float32) if array.dtype == jnp.bfloat16 else array for name, array in file.arrays.items()
    }
    content = io.BytesIO()
    np.savez(content, metadata=np.array(json.dumps(file.metadata)), **arrays)  # pyright: ignore[reportArgumentType]
    try:
        atomic.write_file(prepare_file(out, "--out"), content.getvalue())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error}", status=1) from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and runs one of the commands."""
    parser = ArgumentParser(prog="python -m lm2_jax.memory_file", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="size, norms, effective rank, slots in use, and what was read")
    inspect.add_argument("file")
    diff = commands.add_parser("diff", help="how two memory files differ")
    diff.add_argument("files", nargs=2)
    exported = commands.add_parser("export", help="the arrays as a .npz file")
    exported.add_argument("file")
    exported.add_argument("--out", help="the .npz file; default: FILE.npz")
    merged = commands.add_parser("merge", help="one memory for texts that were read independently (an experiment)")
    merged.add_argument("files", nargs="+", metavar="FILE", help="two memory files or more, the latest text last")
    merged.add_argument("--workdir", required=True, help="of the run that made them")
    merged.add_argument("--out", required=True, help="the memory file to write")
    options = parser.parse_args(arguments)
    if options.command == "inspect":
        print(describe(read_memory_file(options.file)))
    elif options.command == "diff":
        print(compare(*map(read_memory_file, options.files)))
    elif options.command == "export":
        out = options.out or f"{options.file}.npz"
        export(read_memory_file(options.file), out)
        print(f"wrote {out}")
    else:
        merge_files(options.files, options.workdir, options.out)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    cli.run(main)
