"""Reads files that somebody else wrote: whatever goes wrong is one `UserError` with the file and the row.

Text is UTF-8; a byte order mark at its start is skipped.
"""

import codecs
import json
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, NoReturn

from etils import epath

from lm2_jax.atomic import is_remote
from lm2_jax.errors import UserError

MOST_LINE_BYTES = 1 << 28  # of one line of a JSONL file
MOST_JSON_BYTES = 1 << 30  # of a JSON file, which is parsed as one object
MOST_EXPANSION = 200  # text of a Parquet file relative to the file's size; prose compresses 3 to 10 times
FREE_EXPANSION_BYTES = 1 << 26  # text that a Parquet file of any size may hold

_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16"}
_MARKS[codecs.BOM_UTF16_BE] = "UTF-16"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def clean_text(text: str) -> str:
    """`text` with U+FFFD in place of each half of a surrogate pair: no tokenizer and no file takes one."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def check_regular(path: epath.PathLike) -> None:
    """Refuses what is not a regular file: a missing file, a dangling link, a folder, a pipe, a device."""
    if is_remote(path):
        return
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        link = f"a link to {os.readlink(path)!r}, which does not exist" if os.path.islink(path) else "no such file"
        raise UserError(f"{path}: {link}", status=1) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        _refuse(path, error)
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: expected a file, this is {_KINDS.get(stat.S_IFMT(mode), 'no file')}", status=1)


def read_bytes(path: epath.PathLike) -> bytes:
    """The content of a regular file."""
    check_regular(path)
    try:
        return epath.Path(path).read_bytes()
    except OSError as error:
        _refuse(path, error)


def read_text(path: epath.PathLike) -> str:
    """The text of a UTF-8 file, without its byte order mark; line ends are as in the file."""
    return decode(read_bytes(path), str(path))


def decode(content: bytes, where: str, first_row: int = 1) -> str:
    """UTF-8 text without its byte order mark.

    Args:
      content: the encoded text.
      where: file, for the message.
      first_row: number of the first line of `content` in the file.
    Raises:
      UserError: another encoding, with the row of the first wrong byte.
    """
    for mark, name in _MARKS.items():
        if content.startswith(mark):
            raise UserError(f"{where}: expected UTF-8 text, this file begins as {name}; convert it to UTF-8", status=1)
    if content[:1000].count(0) > 200:
        raise UserError(f"{where}: expected UTF-8 text, this is UTF-16 or no text; convert it to UTF-8", status=1)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        body = content.removeprefix(codecs.BOM_UTF8)
        row = first_row + body.count(b"\n", 0, error.start)
        raise UserError(
            f"{where}:{row}: not UTF-8 text (byte 0x{body[error.start]:02x}); convert the file, for example with "
            "`iconv -f latin1 -t utf-8`",
            status=1,
        ) from error


def parse_json(text: str, where: str) -> Any:
    """A JSON value; what is no JSON, is nested too deep or has numbers of thousands of digits is a `UserError`."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UserError(f"{where}: not JSON that can be read: nested too deep", status=1) from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}", status=1) from error


def read_json(path: epath.PathLike) -> Any:
    """The value that a JSON file holds."""
    content = read_bytes(path)
    if len(content) > MOST_JSON_BYTES:
        raise UserError(f"{path}: JSON of more than {MOST_JSON_BYTES >> 20} MiB; write it as JSONL, a row a line", 1)
    return parse_json(decode(content, str(path)), str(path))


def json_lines(path: epath.PathLike) -> Iterator[tuple[int, Any]]:
    """The values of a JSONL file with the numbers of their lines, from 1; empty lines are skipped."""
    check_regular(path)
    try:
        with epath.Path(path).open("rb") as file:
            for row, line in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES + 1), b""), start=1):
                if len(line) > MOST_LINE_BYTES:
                    raise UserError(f"{path}:{row}: a line of more than {MOST_LINE_BYTES >> 20} MiB", status=1)
                text = decode(line, str(path), row).strip()
                if text:
                    yield row, parse_json(text, f"{path}:{row}")
    except OSError as error:
        _refuse(path, error)


def parquet_texts(path: epath.PathLike, column: str) -> Iterator[tuple[int, str]]:
    """The texts of one column of a Parquet file with their row numbers, from 1.

    Raises:
      UserError: a damaged file, no such column, another type, or text that is more than `MOST_EXPANSION` times as
        large as the file.
    """
    check_regular(path)
    try:
        import pyarrow  # slow to import
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet files need the package pyarrow: pip install pyarrow", status=1) from error
    try:
        size = os.path.getsize(path) if not is_remote(path) else epath.Path(path).stat().length
        most = max(FREE_EXPANSION_BYTES, MOST_EXPANSION * size)
        with epath.Path(path).open("rb") as file:
            _check_column(parquet.ParquetFile(file), column, most, path)
            # Repeated texts stay one text in memory until they are counted.
            reader = parquet.ParquetFile(file, read_dictionary=[column])
            row = read = 0
            for batch in reader.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    if not isinstance(text, str):
                        raise UserError(f"{path}:{row}: expected text under {column!r}, got {str(text)[:80]!r}", 1)
                    read += len(text)
                    _check_expansion(read, most, path)
                    yield row, text
    except (pyarrow.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read: {error}", status=1) from error


def _check_column(reader: Any, column: str, most: int, path: epath.PathLike) -> None:
    """Refuses by the file's own description what would not fit, before anything is unpacked."""
    if column not in reader.schema_arrow.names:
        raise UserError(f"{path}: no column {column!r}; it has {reader.schema_arrow.names}. Change the field's name")
    names = [reader.schema.column(i).path for i in range(len(reader.schema))]
    if column not in names:
        raise UserError(f"{path}: column {column!r} holds no plain text", status=1)
    at = names.index(column)
    groups = range(reader.metadata.num_row_groups)
    declared = sum(reader.metadata.row_group(group).column(at).total_uncompressed_size for group in groups)
    _check_expansion(declared, most, path)


def _check_expansion(read: int, most: int, path: epath.PathLike) -> None:
    if read > most:
        raise UserError(
            f"{path}: unpacks to more than {most >> 20} MiB, {MOST_EXPANSION} times its size; it is refused. Convert "
            "it to JSONL if its content is what you expect",
            status=1,
        )


def _refuse(path: epath.PathLike, error: Exception) -> NoReturn:
    raise UserError(f"{str(path)!r}: cannot be read: {getattr(error, 'strerror', None) or error}", 1) from error
