"""What a command leaves behind when it ends."""

import ast
import errno
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm2_jax import cli, commands, quickstart
from lm2_jax.errors import UserError

ROOT = Path(__file__).parents[1]


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


def test_ctrl_c_lets_a_program_save(child, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "program_words", lambda name: [child])
    status, printed = end(lambda: quickstart.run("train", "1", "1", f"{tmp_path}/it"), capsys)
    assert (status, printed.err) == (130, "error: interrupted\n")
    assert (tmp_path / "it").read_text() == "saved"


def test_ctrl_c_twice_kills_it(child, tmp_path):
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        cli.run_program(child, "2", "60", f"{tmp_path}/it")
    assert time.monotonic() - began < 30


# Sends SIGTERM to its parent, as a scheduler does, and saves when it gets it itself.
ENDED = """
import os, pathlib, signal, sys, time
def save(*_):
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


def test_sigterm_is_passed_on(tmp_path):
    before, began = signal.getsignal(signal.SIGTERM), time.monotonic()
    with pytest.raises(SystemExit) as ended:
        cli.run_program("-c", ENDED, f"{tmp_path}/it")
    assert ended.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "it").read_text() == "saved"
    assert time.monotonic() - began < 30
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_status_of_a_program():
    assert cli.run_program("-c", "raise SystemExit(3)") == 3


def test_what_a_program_says_is_shown_and_kept(capsys):
    said: list[bytes] = []
    program = "import sys; print('out'); print('one', file=sys.stderr); sys.exit('two')"
    assert cli.run_program("-c", program, said=said) == 1
    assert b"".join(said).split() == [b"one", b"two"]
    assert capsys.readouterr().err.split() == ["one", "two"]


def test_a_reader_that_ends_early_is_no_error():
    """As in `train.py --list | head -1`."""
    program = "from lm2_jax import cli; cli.run(lambda: [print('x' * 1000) for _ in range(1000)])"
    command = f'"{sys.executable}" -c "{program}" | head -1'
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert done.stdout == "x" * 1000 + "\n"
    assert done.stderr == ""


@pytest.fixture
def clone(monkeypatch, tmp_path):
    """A clone with scripts, in which nothing is installed."""
    for name in ("train.py", "eval.py", "pyproject.toml"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "lm2_jax" / "cli.py"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    return tmp_path


def test_a_program_is_named_as_it_was_called(monkeypatch, clone):
    python = clone / ".venv" / "bin" / "python"
    for called in ("lm2", "/usr/bin/lm2", "lm2 train", "lm2.exe"):
        monkeypatch.setattr(sys, "argv", [called])
        assert (cli.program("eval"), cli.program_words("eval")) == ("lm2 eval", ["-m", "lm2_jax", "eval"])
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert cli.program("eval") == f"{python} {clone / 'eval.py'}"
    assert cli.program("convert") == f"{python} -m lm2_jax convert", "there is no such script"
    monkeypatch.chdir(clone)
    assert cli.program("eval") == ".venv/bin/python eval.py"
    monkeypatch.setattr(cli.shutil, "which", lambda name: str(python))
    assert cli.program("eval") == "python eval.py", "the shell's python is this one"
    (clone / "pyproject.toml").unlink()  # an installed package next to somebody's train.py
    assert cli.program("train") == "python -m lm2_jax train"


@pytest.mark.parametrize("called", ["lm2", "train.py", "/x/lm2_jax/__main__.py"])
@pytest.mark.parametrize(
    "words", [["list"], ["train", "-h"], ["train", "lm2_tiny", "-h"], ["train"], ["train", "--config", "part.json"],
              ["eval", "-h"], ["eval", "recall", "-h"], ["eval"]],
    ids=" ".join,
)  # fmt: skip
def test_messages_name_programs_as_they_were_called(monkeypatch, capsys, tmp_path, called, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "part.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", [called])
    expected = cli.program("eval" if words[0] == "eval" else "train")
    try:
        commands.call(words)
        shown = capsys.readouterr().out
    except UserError as error:
        shown = str(error)
    assert expected in shown
    assert called != "lm2" or not re.search(r"(train|eval)\.py", shown)


def test_no_text_names_a_script_that_only_a_clone_has():
    """Docstrings apart; the help of options is made from docstrings of fields, which are looked at too."""
    offenders = []
    for path in sorted(path for folder in ("lm2_jax", "configs", "sharding") for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                offenders += [f"{path}: {node.value!r}"] * ("train.py" in node.value or "eval.py" in node.value)
    assert not offenders
