"""What a command leaves behind when it ends."""

import errno

import pytest

from lm2_jax import cli
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
