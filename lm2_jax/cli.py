"""What all programs share: errors as one message with an exit status, and calls of other programs."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

from lm2_jax.errors import UserError

# Errors of the machine that only a user can correct; any other OSError is a bug and keeps its traceback.
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def run(main: Callable[[], None]) -> NoReturn:
    """Calls `main` and exits the process: 0 for success, 2 for wrong usage, 1 for a failure, 130 after Ctrl-C.

    A `UserError`, and a full or read-only disk, is printed as one message on stderr. Any other exception is a bug and
    keeps its traceback.

    Args:
      main: the program, including the parsing of its arguments.
    """
    try:
        main()
    except UserError as error:
        _leave(str(error), error.status)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would fail again
        sys.exit(1)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        _leave(str(error), 1)
    sys.exit(0)


def run_program(*words: str) -> int:
    """Runs a Python program and waits for its end.

    Ctrl-C also reaches that program, which may have something to save. It gets the time to do so, where
    `subprocess.run` would kill it after a quarter of a second. A second Ctrl-C kills it.

    Args:
      words: the arguments of `python`.
    Returns:
      The program's exit status.
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
    sys.stdout.flush()  # so that the message follows earlier output
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
