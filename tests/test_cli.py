"""What a command leaves behind when it ends."""

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm2_jax import cli, quickstart
from lm2_jax.errors import UserError


def end(main, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    return caught.value.code, capsys.readouterr()


def raising(error):
    def main() -> None:
        print("working")
        raise error

    return main


def test_success(capsys):
    status, printed = end(lambda: print("done"), capsys)
    assert (status, printed.out, printed.err) == (0, "done\n", "")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("a is wrong"), 2, "error: a is wrong\n"),
        (UserError("b is damaged", status=1), 1, "error: b is damaged\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x/y"),
            1,
            "error: [Errno 28] No space left on device: 'x/y'\n",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "error: [Errno 13] Permission denied: 'x'\n"),
        (SystemExit(7), 7, ""),
    ],
)
def test_messages(capsys, error, status, message):
    code, printed = end(raising(error), capsys)
    assert (code, printed.out, printed.err) == (status, "working\n", message)


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "No such file", "x")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        cli.run(raising(error))


# Interrupts its parent as often as it is told, as Ctrl-C does which reaches both, and saves for as long as it is told.
CHILD = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
for _ in range(int(sys.argv[1])):
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(0.5)
time.sleep(float(sys.argv[2]))
pathlib.Path(sys.argv[3]).write_text("saved")
"""


@pytest.fixture
def child(tmp_path):
    """A program, and a process that Ctrl-C interrupts even where the test's runner ignores it."""
    (tmp_path / "child.py").write_text(CHILD)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield str(tmp_path / "child.py")
    signal.signal(signal.SIGINT, old)


def test_ctrl_c_lets_a_program_save(child, tmp_path, capsys):
    status, printed = end(lambda: quickstart.run(child, "1", "1", f"{tmp_path}/it"), capsys)
    assert (status, printed.err) == (130, "error: interrupted\n")
    assert (tmp_path / "it").read_text() == "saved"


def test_ctrl_c_twice_kills_it(child, tmp_path):
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        cli.run_program(child, "2", "60", f"{tmp_path}/it")
    assert time.monotonic() - began < 30


def test_the_status_of_a_program():
    assert cli.run_program("-c", "raise SystemExit(3)") == 3


def test_a_reader_that_ends_early_is_no_error():
    """As in `train.py --list | head -1`."""
    program = "from lm2_jax import cli; cli.run(lambda: [print('x' * 1000) for _ in range(1000)])"
    command = f'"{sys.executable}" -c "{program}" | head -1'
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert done.stdout == "x" * 1000 + "\n"
    assert done.stderr == ""
