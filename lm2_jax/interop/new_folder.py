"""Folders that appear with all of their files or not at all."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

from lm2_jax.atomic import TEMPORARY, is_remote
from lm2_jax.errors import UserError


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], option: str) -> Iterator[pathlib.Path]:
    """Gives a temporary folder next to `path`, which gets that name when everything inside is written.

    A process that is killed leaves the temporary folder, whose name begins with a dot.

    Args:
      path: of the folder; it must not exist, or be empty.
      option: what the user calls it.
    Raises:
      UserError: there is something at `path`, or the folder cannot be made.
    """
    if is_remote(path):
        raise UserError(
            f"{option} {os.fspath(path)}: expected a folder of this machine; copy it to a bucket afterwards"
        )
    target = pathlib.Path(os.path.abspath(path))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{option} {path}: there is something already; choose a new folder")
    temporary = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be made: {error.strerror}", status=1) from error
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)  # also where an empty folder has this name
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{option} {path}: writing failed: {error}. Nothing was written", status=1) from error
        raise


def _flush(folder: pathlib.Path) -> None:
    """Flushes the folder's entries to the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
