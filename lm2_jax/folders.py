"""Paths that a command will write to, checked before its work."""

import os
import uuid

from etils import epath

from lm2_jax.atomic import is_remote
from lm2_jax.errors import UserError


def open_path(path: epath.PathLike, field: str) -> epath.Path:
    """A path that this process can reach.

    Args:
      path: folder, file or bucket.
      field: what the user calls it, for messages.
    Raises:
      UserError: it is empty, its scheme is unknown, or the bucket's library is not installed.
    """
    text = os.fspath(path)
    if not text.strip() or "\0" in text:
        raise UserError(f"{field}={text!r}: expected the path of a folder")
    if not is_remote(path):
        return epath.Path(path)
    scheme = text.split("://")[0]
    try:
        made = epath.Path(text)
        made.exists()
        return made
    except KeyError as error:
        raise UserError(
            f"{field}={text!r}: unknown kind of bucket {scheme + '://'!r}; known: gs://, s3://, az://, hf://"
        ) from error
    except ImportError as error:
        raise UserError(
            f"{field}={text!r}: the library for {scheme}:// is not installed: {_line(error)}", status=1
        ) from error
    except Exception as error:  # whatever a bucket's library raises without network or rights
        raise UserError(f"{field}={text!r}: cannot be reached: {_line(error)}", status=1) from error


def check_writable(folder: epath.Path, field: str) -> None:
    """Tries whether files can be written to a folder; nothing is left, and a missing folder is not made.

    Args:
      folder: local or a bucket; it may be missing.
      field: what the user calls it, for messages.
    Raises:
      UserError: nothing can be written there.
    """
    place = folder
    while not is_remote(place) and not place.exists() and place.parent != place:
        place = place.parent
    trial = place / f".trial-{uuid.uuid4().hex}"
    try:
        trial.write_bytes(bytes(1 << 12))
        trial.unlink()
    except Exception as error:  # of a bucket, whatever its library raises
        raise UserError(
            f"{field}={os.fspath(folder)!r}: cannot write there: {_line(error)}. Choose another place, or make it "
            "writable.",
            status=1,
        ) from error


def check_folder(out: epath.PathLike, field: str) -> epath.Path:
    """Checks that files can be written to a folder, which may be missing; nothing is made.

    Raises:
      UserError: it cannot be written to.
    """
    folder = open_path(out, field)
    check_writable(folder, field)
    return folder


def prepare_folder(out: epath.PathLike, field: str = "out") -> epath.Path:
    """Makes a folder and checks that files can be written to it.

    Args:
      out: folder or bucket.
      field: what the user calls it, for messages.
    Raises:
      UserError: it cannot be made or written to.
    """
    folder = check_folder(out, field)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{field}={str(out)!r}: cannot write there: {error}", status=1) from error
    return folder


def check_file(out: epath.PathLike, field: str) -> epath.Path:
    """Checks that a file can be written; its folder may be missing. Nothing is made and no file is changed."""
    file = open_path(out, field)
    if file.is_dir():
        raise UserError(f"{field}={str(out)!r}: expected a file, this is a folder", status=1)
    if is_remote(out) or not os.access(out, os.W_OK):  # a device such as /dev/null is in a folder that takes no files
        if not is_remote(out) and os.path.exists(out):
            raise UserError(f"{field}={str(out)!r}: may not be written to", status=1)
        check_folder(file.parent, f"the folder of {field}")
    return file


def prepare_file(out: epath.PathLike, field: str) -> epath.Path:
    """Checks that a file can be written and makes the folder that it will be in; an existing file is not changed."""
    file = check_file(out, field)
    if not file.exists():
        prepare_folder(file.parent, f"the folder of {field}")
    return file


def _line(error: Exception) -> str:
    """The first line of an exception's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
