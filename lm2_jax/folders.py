"""Places where a command will write, tried before its work: a bad one fails then, not after it."""

import os
import uuid

from etils import epath

from lm2_jax.errors import UserError


def prepare_folder(out: epath.PathLike, field: str = "out") -> epath.Path:
    """Makes a folder and writes a file there on trial.

    Args:
      out: folder or bucket.
      field: what the user calls it, for the message.
    Raises:
      UserError: it cannot be made or written to.
    """
    folder = epath.Path(out)
    trial = folder / f".trial-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_text("")
        trial.unlink()
    except OSError as error:
        raise UserError(f"{field}={str(out)!r}: cannot write there: {error}", status=1) from error
    return folder


def prepare_file(out: epath.PathLike, field: str) -> epath.Path:
    """The same for a single file: makes the folder that it will lie in; a file that is there already stays as it is."""
    file = epath.Path(out)
    if file.is_dir():
        raise UserError(f"{field}={str(out)!r}: expected a file, this is a folder", status=1)
    if not os.access(out, os.W_OK):  # a device such as /dev/null may lie in a folder that takes no other files
        if os.path.exists(out):
            raise UserError(f"{field}={str(out)!r}: may not be written to", status=1)
        prepare_folder(file.parent, f"the folder of {field}")
    return file
