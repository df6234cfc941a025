"""What all programs share: errors as one message with an exit status, how they are called, and calls of others."""

import contextlib
import errno
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO, NoReturn

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


def run_program(*words: str, said: list[bytes] | None = None) -> int:
    """Runs a Python program and waits for its end.

    Ctrl-C also reaches that program, which may have something to save. It gets the time to do so, where
    `subprocess.run` would kill it after a quarter of a second. A second Ctrl-C kills it. SIGTERM is passed on.

    Args:
      words: the arguments of `python`.
      said: gets what the program writes to stderr, which is shown all the same.
    Returns:
      The program's exit status.
    Raises:
      KeyboardInterrupt: after Ctrl-C, when the program has ended.
      SystemExit: after SIGTERM, when the program has ended.
    """
    sys.stdout.flush()
    with sigterm_as_exit():
        program = subprocess.Popen([sys.executable, *words], stderr=None if said is None else subprocess.PIPE)
        reader = threading.Thread(target=_forward, args=(program.stderr, said))
        if said is not None:
            reader.start()
        try:
            return program.wait()
        except (KeyboardInterrupt, SystemExit) as stopped:
            if isinstance(stopped, SystemExit):
                program.terminate()
            try:
                program.wait()
            finally:
                program.kill()
                program.wait()
            raise
        finally:
            if said is not None:
                reader.join()


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """While it is open, SIGTERM raises SystemExit in the main thread, so that programs that were started can be ended.

    Without it, SIGTERM kills this process alone, and the programs continue.
    """
    if threading.current_thread() is not threading.main_thread():  # the only one that may set a handler
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _exit(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)


def _forward(pipe: IO[bytes], said: list[bytes]) -> None:
    """Shows what a program writes, as it comes, and keeps it."""
    with pipe:
        while chunk := os.read(pipe.fileno(), 1 << 16):
            sys.stderr.write(chunk.decode("utf-8", "replace"))
            sys.stderr.flush()
            said.append(chunk)


def program(name: str) -> str:
    """The command that calls a program here, for messages: `lm2 train`, or `python train.py` in a clone.

    It works as it is printed: it is called as this process was, with the interpreter of this environment.

    Args:
      name: of the program, see `lm2_jax.commands.PROGRAMS`.
    """
    return f"lm2 {name}" if _is_console_command() else shlex.join([_python(), *program_words(name)])


def program_words(name: str) -> list[str]:
    """The arguments of `python` that call a program: a script of the clone, or a module."""
    root = pathlib.Path(__file__).parents[1]
    script = root / f"{name}.py"
    if _is_console_command() or not script.is_file() or not (root / "pyproject.toml").is_file():
        return ["-m", "lm2_jax", name]
    return [_relative(script)]


def _is_console_command() -> bool:
    """Whether this process was started as `lm2`."""
    return pathlib.Path(sys.argv[0].partition(" ")[0]).stem == "lm2"


def _python() -> str:
    """The interpreter as a person can type it, which may not be the shell's."""
    found = shutil.which("python")
    return "python" if found is not None and os.path.abspath(found) == sys.executable else _relative(sys.executable)


def _relative(path: str | pathlib.Path) -> str:
    path, folder = pathlib.Path(path), pathlib.Path.cwd()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _leave(message: str, status: int) -> NoReturn:
    sys.stdout.flush()  # so that the message follows earlier output
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
