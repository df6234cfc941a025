"""Atomic files: a reader, or a run killed at any moment, finds the old content or the new content and nothing between.

Every file that the product replaces is written here. Files that only grow (`metrics.jsonl`) are appended to.
"""

import contextlib
import os
import re
import stat
import uuid
from collections.abc import Mapping

from etils import epath

TEMPORARY = ".lm2-tmp-"  # how a temporary file's name begins; a random part follows


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path names a bucket (`gs://bucket/run`) and not a local file."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path)) is not None


def write_file(path: epath.PathLike, content: bytes | str) -> bool:
    """Replaces a file by `content`, all of it or nothing; the folder must exist.

    A local file is written under a temporary name in the same folder, flushed to the disk and renamed. The temporary
    name is random and is created exclusively, so it never follows a symbolic link. A link at `path` itself is
    replaced by a file. Devices and pipes (`/dev/stdout`) are written to directly. A bucket replaces objects
    atomically by itself.

    Args:
      path: file to write, local or in a bucket.
      content: the new content; text is encoded as UTF-8.
    Returns:
      Whether anything was written: a file that already has this content is not touched.
    Raises:
      OSError: the file cannot be written; the old content is unchanged.
    """
    return bool(write_files({path: content}))


def write_files(contents: Mapping[epath.PathLike, bytes | str]) -> list[epath.PathLike]:
    """Replaces several files; none is renamed before all are completely on the disk.

    Args:
      contents: new content by path, see `write_file`. The files are renamed in this order.
    Returns:
      The paths that were written; files that already have their content are left out.
    Raises:
      OSError: a file cannot be written; unless a rename itself failed, all old contents are unchanged.
    """
    changed = {path: _encode(content) for path, content in contents.items() if not _has(path, _encode(content))}
    waiting: list[tuple[str, str]] = []
    try:
        for path, content in changed.items():
            if is_remote(path):
                epath.Path(path).write_bytes(content)
            elif _is_special(path):
                with open(path, "wb") as file:
                    file.write(content)
            else:
                waiting.append((_write_temporary(path, content), os.fspath(path)))
        while waiting:
            os.replace(*waiting[0])
            _sync_folder(os.path.dirname(waiting.pop(0)[1]))
    finally:
        for temporary, _ in waiting:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return list(changed)


def remove_temporaries(folder: epath.PathLike) -> None:
    """Removes the temporary files of writers that were killed; no other process may be writing to the folder."""
    if is_remote(folder) or not os.path.isdir(folder):
        return
    for entry in os.scandir(folder):
        if entry.name.startswith(TEMPORARY):
            with contextlib.suppress(OSError):
                os.unlink(entry.path)


def _encode(content: bytes | str) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _has(path: epath.PathLike, content: bytes) -> bool:
    """Whether a regular file, not a link, already has this content."""
    try:
        if is_remote(path):
            file = epath.Path(path)
            return file.exists() and file.read_bytes() == content
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size != len(content):
            return False
        with open(path, "rb") as file:
            return file.read() == content
    except OSError:
        return False  # a file that cannot be read is replaced


def _is_special(path: epath.PathLike) -> bool:
    """Whether a path leads to a device or a pipe, which cannot be replaced."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _write_temporary(path: epath.PathLike, content: bytes) -> str:
    """Writes a new temporary file next to `path`, flushes it to the disk, and gives its name."""
    temporary = os.path.join(os.path.dirname(os.fspath(path)), TEMPORARY + uuid.uuid4().hex)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    try:
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:  # the user's umask applies
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return temporary


def _sync_folder(folder: str) -> None:
    """Flushes a rename to the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
