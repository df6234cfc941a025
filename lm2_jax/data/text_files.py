"""Documents of plain text from a folder, a file or a glob pattern."""

import fnmatch
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from etils import epath

from lm2_jax.atomic import is_remote
from lm2_jax.data.files import clean_text, json_lines, parquet_texts, read_json, read_text
from lm2_jax.errors import UserError

_PATTERN = frozenset("*?[")


class Document(NamedTuple):
    """The text of one document, and where it comes from for messages."""

    text: str
    where: str  # the file, with `:row` where a file holds several


def read_documents(path: epath.PathLike, field: str) -> Iterator[Document]:
    """Documents in the order of the file names.

    A .txt, .md or .text file is a document, and so is any file that is named itself and has another ending. Each line
    of a .jsonl or .ndjson file, each element of the list in a .json file, and each row of a .parquet file is a
    document.

    Args:
      path: a file, a folder (searched to any depth), or a glob pattern, in which `**` matches folders of any depth.
      field: name under which a row has its text.
    Yields:
      Every document, empty ones included.
    Raises:
      UserError: nothing there, or a file that cannot be read.
    """
    for file in list_files(path):
        for text, where in _READERS.get(file.suffix.lower(), _whole_file)(file, field):
            yield Document(clean_text(text), where)


def list_files(path: epath.PathLike) -> list[epath.Path]:
    """The files that `read_documents` reads, in its order.

    Links are followed, but no file is listed twice: a link to a folder above it adds nothing. Names that begin with a
    dot are skipped. A folder's .json files are read only where it has no other texts, since such a file often
    describes the texts next to it.
    """
    root = epath.Path(os.path.expanduser(os.fspath(path))) if not is_remote(path) else epath.Path(path)
    if os.fspath(path) and root.is_dir():
        files = sorted(_walk(root))
        texts = [file for file in files if file.suffix.lower() != ".json"] or files
        if not texts:
            raise UserError(f"{path}: no texts in this folder; expected {', '.join(_READERS)} files")
        return _without_copies(texts)
    if not root.exists() and not os.path.islink(root) and _PATTERN & set(os.fspath(path)):
        found = sorted(_glob(root))
        if not found:
            raise UserError(f"{path}: no file matches this pattern")
        return _without_copies(found)
    if not os.fspath(path) or (not root.exists() and not os.path.islink(root)):
        raise UserError(
            f"{path}: no such file or folder; expected .txt, .md, .jsonl or other text files. Change --text "
            "(or data.source.path)"
        )
    return [root]


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    """Files with a known ending below a folder."""
    for inner in _folders(folder, set()):
        yield from (e for e in _entries(inner) if e.suffix.lower() in _READERS and not e.is_dir())


def _folders(folder: epath.Path, visited: set[str]) -> Iterator[epath.Path]:
    """A folder and those below it, each real folder once, so that a loop of links ends."""
    real = os.fspath(folder) if is_remote(folder) else os.path.realpath(folder)
    if real in visited:
        return
    visited.add(real)
    yield folder
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _folders(entry, visited)


def _entries(folder: epath.Path, pattern: str = "*") -> list[epath.Path]:
    """The sorted entries of a folder whose names match; names with a leading dot only if the pattern has one."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}", status=1) from error
    is_hidden = pattern.startswith(".")
    return [e for e in entries if e.name.startswith(".") == is_hidden and fnmatch.fnmatchcase(e.name, pattern)]


def _glob(pattern: epath.Path) -> list[epath.Path]:
    """The files that match; the library's glob never ends where `**` meets two loops of links."""
    first = next(i for i, part in enumerate(pattern.parts) if _PATTERN & set(part))
    found = [epath.Path(*pattern.parts[:first]) if first else epath.Path(".")]
    for part in pattern.parts[first:]:
        folders = [path for path in found if path.is_dir()]
        if part == "**":
            visited: set[str] = set()
            found = [inner for folder in folders for inner in _folders(folder, visited)]
        else:
            found = [entry for folder in folders for entry in _entries(folder, part)]
    return [path for path in found if not path.is_dir()]


def _without_copies(files: list[epath.Path]) -> list[epath.Path]:
    """The files without further links to the same file."""
    real = {os.fspath(file) if is_remote(file) else os.path.realpath(file): file for file in reversed(files)}
    return sorted(real.values())


def _whole_file(file: epath.Path, field: str) -> Iterator[Document]:
    yield Document(read_text(file), str(file))


def _lines(file: epath.Path, field: str) -> Iterator[Document]:
    for row, value in json_lines(file):
        yield _document(value, field, f"{file}:{row}")


def _json(file: epath.Path, field: str) -> Iterator[Document]:
    value = read_json(file)
    if isinstance(value, dict) and isinstance(value.get(field), list):
        value = value[field]  # columns
    for row, entry in enumerate(value if isinstance(value, list) else [value], start=1):
        yield _document(entry, field, f"{file}: row {row}")


def _parquet(file: epath.Path, field: str) -> Iterator[Document]:
    for row, text in parquet_texts(file, field):
        yield Document(text, f"{file}:{row}")


def _document(value: Any, field: str, where: str) -> Document:
    """The document of a JSON value: an object with a text under `field`, or a text."""
    text = value.get(field) if isinstance(value, dict) else value
    if not isinstance(text, str):
        came = f"one with {sorted(map(str, value))[:10]}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise UserError(
            f"{where}: expected an object with text under {field!r}, got {came}; set the field's name "
            "(data.source.field of a run, --field of the converter)"
        )
    return Document(text, where)


_READERS: dict[str, Callable[[epath.Path, str], Iterator[Document]]] = {
    ".txt": _whole_file,
    ".text": _whole_file,
    ".md": _whole_file,
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".parquet": _parquet,
    ".json": _json,
}


def cut_document(document: Document, most: int | None) -> Iterator[Document]:
    """A document in parts of at most `most` characters that end at a paragraph, a line or a word where one does.

    Args:
      document: the document.
      most: characters of a part; None: the document is not cut.
    Yields:
      The parts; joined, their texts are the document's.
    """
    text, start = document.text, 0
    while most is not None and len(text) - start > most:
        low = start + most // 2
        ends = (text.rfind(mark, low, start + most) + len(mark) for mark in ("\n\n", "\n", " "))
        end = next((end for end in ends if end > low + 1), start + most)
        yield Document(text[start:end], f"{document.where}, character {start}")
        start = end
    yield document if start == 0 else Document(text[start:], f"{document.where}, character {start}")
