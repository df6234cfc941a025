"""What every command does around its work: one message instead of a traceback, an exit status, programs it calls."""

import errno
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

from lm2_jax.errors import UserError

# What the machine refuses and no line of code can put right; any other OSError is a bug and keeps its traceback.
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def run(main: Callable[[], None]) -> NoReturn:
    """Calls `main` and leaves the process: 0 for success, 2 for wrong usage, 1 for a failure, 130 after Ctrl-C.

    A `UserError`, and a full or read-only disk, is printed as one message on stderr. Whatever else is raised is a
    bug and keeps its traceback.

    Args:
      main: the whole command, parsing of arguments included (tyro itself leaves with 2 when they are wrong).
    """
    try:
        main()
    except UserError as error:
        _leave(str(error), error.status)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        _leave(str(error), 1)
    sys.exit(0)


def run_program(*words: str) -> int:
    """Runs a Python program to its end.

    Ctrl-C reaches the program too, which may have something to save: it is waited for, while `subprocess.run` would
    kill it after a quarter of a second. A second Ctrl-C kills it.

    Args:
      words: what a person would type behind `python`.
    Returns:
      Its exit status.
    Raises:
      KeyboardInterrupt: after Ctrl-C, when the program has ended.
    """
    sys.stdout.flush()
    program = subprocess.Popen([sys.executable, *words])
    try:
        return program.wait()
    except KeyboardInterrupt:
        try:
            program.wait()
        finally:
            program.kill()
            program.wait()
        raise


def _leave(message: str, status: int) -> NoReturn:
    sys.stdout.flush()  # so that the message comes after what was printed before
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
