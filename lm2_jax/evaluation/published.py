"""Reads BABILong data sets as they are published: the folder layouts of the hub, and rows in the usual containers."""

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from lm2_jax.babilong import TASKS, Sample, labels, length_name, length_tokens
from lm2_jax.data.files import clean_text
from lm2_jax.errors import UserError
from lm2_jax.registry import near_misses

_MAX_DEPTH = 5  # folders below the data folder that are searched
_LAYOUTS = "<length>/<task>, <task>/<length>, <length>/<task>-00000-of-00001 or <length>/<task>/0000"
_WRAPPERS = ("data", "rows", "examples", "samples")  # keys under which files keep their list of rows

Files = tuple[epath.Path, ...]  # one set: a file, or its shards in order


class _Place(NamedTuple):
    """The set that a file belongs to, by its path."""

    task: str
    length: str
    shard: int | None = None  # None: the file is the complete set
    shards: int | None = None  # None: the number is not part of the name


def published_files(data_dir: epath.PathLike) -> dict[str, dict[str, Files]]:
    """The files of a data folder, in any of the layouts in which BABILong is published.

    The layouts are `<length>/<task>.json`, `<task>/<length>.json` (the hub's `data/` folder), shards
    `<length>/<task>-00000-of-00001.parquet`, and `<length>/<task>/0000.parquet` (the hub's converted branch), each
    with .json, .jsonl or .parquet files and at any depth below `data_dir`. Files with other names are ignored.

    Returns:
      Files by length, shortest first, and by task, in the order of the tasks.
    Raises:
      UserError: there is no such folder, no such file in it, a task without a length, an unknown task, one set in
        two files, or a missing shard.
    """
    folder = epath.Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"data_dir={str(data_dir)!r}: no such folder")
    sets: dict[tuple[str, str], list[tuple[_Place, epath.Path]]] = {}
    for parts, path in _walk(folder):
        place = _place(parts, path)
        if place is not None:
            sets.setdefault((place.task, place.length), []).append((place, path))
    if not sets:
        raise UserError(
            f"data_dir={str(data_dir)!r}: expected files named {_LAYOUTS}, with one of {', '.join(_READERS)}, such as "
            f"4k/qa1.json; it holds {sorted(path.name for path in folder.iterdir())[:10]}"
        )
    joined = {names: _joined(names, found) for names, found in sets.items()}
    lengths = sorted({length for _, length in sets}, key=length_tokens)
    return {length: {task: joined[task, length] for task in TASKS if (task, length) in joined} for length in lengths}


def select_files(
    data_dir: epath.PathLike, tasks: Sequence[str] = (), lengths: Sequence[str] = ()
) -> dict[tuple[str, str], Files]:
    """The files of `tasks` and `lengths` below `data_dir`, by (task, length); empty selects all.

    Raises:
      UserError: as `published_files`, and for a task or length that is not there.
    """
    for task in tasks:
        labels(task)
    wanted = tuple(dict.fromkeys(map(length_name, lengths)))
    found = published_files(data_dir)
    selected: dict[tuple[str, str], Files] = {}
    for length in wanted or tuple(found):
        if length not in found:
            raise UserError(f"lengths: {data_dir} holds no {length!r}, only {list(found)}")
        for task in tasks or tuple(found[length]):
            if task not in found[length]:
                raise UserError(f"tasks: {data_dir}/{length} holds no {task!r}, only {list(found[length])}")
            selected[task, length] = found[length][task]
    return selected


def read_samples(path: epath.PathLike) -> list[Sample]:
    """The rows of one file.

    Args:
      path: a .json or .jsonl file (a list of objects, an object per line, columns, or any layout that pandas
        writes) or a .parquet file. Each row has the texts `input`, `question` and `target`; other fields are
        ignored. A byte order mark is skipped, and half of a surrogate pair becomes U+FFFD.
    Raises:
      UserError: the file is missing, damaged or empty, or a row lacks a field.
    """
    path = epath.Path(path)
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{path}: expected a name that ends in one of {list(_READERS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    rows = _READERS[path.suffix.lower()](path.read_bytes(), str(path))
    if not rows:
        raise UserError(f"{path}: holds no rows", status=1)
    return [_sample(row, f"{path}, row {number}") for number, row in enumerate(rows)]


def read_set(files: Files) -> list[Sample]:
    """The rows of one set, its shards joined; arguments and errors as in `read_samples`."""
    return [sample for path in files for sample in read_samples(path)]


def _walk(folder: epath.Path, parents: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], epath.Path]]:
    """Files that can be read, with their folders and name without suffix; hidden folders are left out."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if len(parents) < _MAX_DEPTH:
                yield from _walk(path, (*parents, path.name))
        elif path.suffix.lower() in _READERS:
            yield (*parents, path.name.removesuffix(path.suffix)), path


def _place(parts: tuple[str, ...], path: epath.Path) -> _Place | None:
    """The set that a file belongs to; None if its name is not that of a set.

    Raises:
      UserError: the name has a task, but no length, or the other way round with a misspelt task.
    """
    *folders, name = parts
    shard = shards = None
    if match := re.fullmatch(r"(.+)-([0-9]{1,6})-of-([0-9]{1,6})", name):
        name, shard, shards = match[1], int(match[2]), int(match[3])
    elif re.fullmatch("[0-9]{1,6}", name) and _is_pair(folders[-2:]):  # `4k/qa1/0000`, but not `data/qa1/4096`
        *folders, name, shard = *folders, int(name)
    first, second = (folders[-1] if folders else ""), name
    for task, length in ((second, first), (first, second)):
        if (named := _task(task)) is None:
            continue
        if named not in TASKS:
            raise UserError(f"{path}: unknown task {task!r}; tasks are qa1 to qa20.{near_misses(named, list(TASKS))}")
        if (known := _length(length)) is None:
            raise UserError(
                f"{path}: the task {task!r} without a length: expected {_LAYOUTS}, such as 4k/qa1.json; it holds "
                f"{[path.name]}. Lengths are written 4k, 128k, 1M or 4096; got {length!r}"
            )
        return _Place(named, known, shard, shards)
    return None


def _is_pair(names: Sequence[str]) -> bool:
    """Whether two folders are a task and a length."""
    return len(names) == 2 and any(map(_task, names)) and any(map(_length, names))


def _task(name: str) -> str | None:
    """The task that a name means ("QA1" is "qa1"; "qa21" is returned too); None for any other name."""
    return name.lower() if re.fullmatch(r"[qQ][aA][0-9]{1,6}", name) else None


def _length(name: str) -> str | None:
    """The published name of a length; None for any other name."""
    try:
        return length_name(name)
    except UserError:
        return None


def _joined(names: tuple[str, str], found: list[tuple[_Place, epath.Path]]) -> Files:
    """The files of one set in order, proved to be complete."""
    found.sort(key=lambda entry: (entry[0].shard or 0, str(entry[1])))
    places, paths = [place for place, _ in found], tuple(path for _, path in found)
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: not a file that can be read (a dangling link, or a device)", status=1)
    if len(found) == 1 and places[0].shard is None:
        return paths
    numbers, totals = [place.shard for place in places], {place.shards for place in places}
    if None in numbers or len(set(numbers)) < len(numbers) or len(totals) > 1:
        raise UserError(f"data_dir: one set in two files, {paths[0]} and {paths[1]}; remove one of them")
    total = totals.pop()
    if numbers != list(range(len(numbers) if total is None else total)):
        raise UserError(
            f"data_dir: {names[0]} at {names[1]} lacks shards: found {[path.name for path in paths]}; download the "
            "missing ones"
        )
    return paths


def _sample(row: Any, where: str) -> Sample:
    """One row of a file as a `Sample`, checked."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with {list(Sample._fields)}, got {row!r:.80}", status=1)
    for field in Sample._fields:
        if field not in row:
            raise UserError(f"{where}: no field {field!r}, only {sorted(map(str, row))[:20]}", status=1)
        if not isinstance(row[field], str):
            raise UserError(f"{where}: {field!r} must be text, got {row[field]!r:.80}", status=1)
    for field in ("question", "target"):
        if not row[field].strip():
            raise UserError(f"{where}: {field!r} is empty", status=1)
    return Sample(*(clean_text(row[field]) for field in Sample._fields))


def _read_json(content: bytes, where: str) -> list[Any]:
    """The rows of a JSON document, or of one per line."""
    try:
        text = content.decode(json.detect_encoding(content))  # knows byte order marks, UTF-16 and UTF-32
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text: {error}", status=1) from error
    try:
        document = json.loads(text) if text.strip() else []
    except RecursionError as error:
        raise UserError(f"{where}: not valid JSON: nested too deeply", status=1) from error
    except ValueError as error:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        if len(lines) < 2 or not _is_json(lines[0][1]):
            raise UserError(f"{where}: not valid JSON: {error}", status=1) from error
        return [_line(line, f"{where}, line {number}") for number, line in lines]
    return _rows(document, where)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _line(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}", status=1) from error


def _rows(document: Any, where: str) -> list[Any]:
    """The rows of a JSON document, in whichever container they are.

    Containers: a list of rows; one row; a list or a table per column; a row per index; names and rows apart
    (pandas: records, columns, index, split, table); any of these under `data`, `rows`, `examples` or `samples`.
    """
    if isinstance(document, list):
        inner = [row.get("row") if isinstance(row, dict) else None for row in document]
        return inner if inner and all(isinstance(row, dict) for row in inner) else document
    if not isinstance(document, dict):
        raise UserError(f"{where}: expected a list of rows, got {type(document).__name__}", status=1)
    columns = [document[field] for field in Sample._fields if field in document]
    if len(columns) == len(Sample._fields) and all(isinstance(column, (list, dict)) for column in columns):
        return _rows_of_columns(columns, where)
    names, data = document.get("columns"), document.get("data")
    if isinstance(names, list) and isinstance(data, list):
        return [_named(names, row, f"{where}, row {number}") for number, row in enumerate(data)]
    if columns:
        return [document]
    for key in _WRAPPERS:
        if isinstance(document.get(key), (list, dict)):
            return _rows(document[key], where)
    if document and all(isinstance(row, dict) for row in document.values()):
        return list(document.values())
    raise UserError(
        f"{where}: expected rows with {list(Sample._fields)} as a list, as columns, or as pandas writes them; got an "
        f"object with {sorted(document)[:10]}",
        status=1,
    )


def _rows_of_columns(columns: list[Any], where: str) -> list[Any]:
    """Rows of columns, each a list or an object by row label."""
    labels = [list(column) if isinstance(column, dict) else list(range(len(column))) for column in columns]
    if any(other != labels[0] for other in labels):
        raise UserError(f"{where}: columns of different rows: {[len(column) for column in columns]}", status=1)
    return [dict(zip(Sample._fields, (column[label] for column in columns), strict=True)) for label in labels[0]]


def _named(names: list[Any], row: Any, where: str) -> dict[str, Any]:
    """A row whose column names are kept apart."""
    if not isinstance(row, list) or len(row) != len(names):
        raise UserError(f"{where}: expected a list of {len(names)} values, got {row!r:.80}", status=1)
    return dict(zip(map(str, names), row, strict=True))


def _read_parquet(content: bytes, where: str) -> list[Any]:
    # Only this format needs pyarrow, which is slow to import.
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{where}: Parquet files need the package pyarrow: pip install pyarrow", status=1) from error
    try:
        return parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{where}: not a valid Parquet file: {error}", status=1) from error


_READERS: dict[str, Callable[[bytes, str], list[Any]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}
