"""The quickstart's commands and its last words; the programs themselves are stand-ins here."""

import json
import pathlib
import shlex
import sys

import pytest
import tyro

from lm2_jax import PRESETS, cli, quickstart
from lm2_jax.errors import UserError
from lm2_jax.evaluation import SUITES
from tests.e2e.test_train_program import call


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """Records what would be run in an empty folder, and leaves the results of an evaluation."""
    ran: list[list[str]] = []

    def run_program(*words: str) -> int:
        ran.append(list(words))
        if words[:2] == ("eval.py", "recall"):
            results = [
                {"model": "LM2, block write (ours)", "asked": [9, 10, 10, 10, 10, 5], "right": [9, 10, 9, 8, 8, 5]},
                {"model": "baseline (no memory)", "asked": [9, 10, 10, 10, 10, 5], "right": [9, 2, 2, 2, 2, 5]},
            ]
            out = pathlib.Path(words[words.index("--out") + 1])
            out.mkdir(parents=True)
            (out / "recall.json").write_text(json.dumps({"results": results}))
        return 0

    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    monkeypatch.setattr(cli, "run_program", run_program)
    return ran


def test_quickstart(programs, capsys):
    quickstart.main()
    printed = capsys.readouterr().out
    assert [words[:2] for words in programs] == [
        ["train.py", "quickstart"],
        ["train.py", "quickstart_none"],
        ["eval.py", "recall"],
        ["eval.py", "babilong"],
    ]
    assert all(words[1] in PRESETS for words in programs[:2])
    for words in programs[2:]:
        tyro.extras.subcommand_cli_from_dict(dict(SUITES), args=words[1:])
    for words in programs:
        assert f"$ {quickstart.printed(*words)}" in printed
    assert "LM2, block write (ours)      87.5%" in printed
    assert "baseline (no memory)         20.0%" in printed
    assert "tables and pictures in runs/quickstart/eval" in printed
    assert shlex.split(printed.splitlines()[-1])[1:3] == ["train.py", "quickstart"]


def test_the_printed_interpreter_is_this_one(monkeypatch, tmp_path):
    """Relative where it is below the current folder, as `.venv/bin/python`, so that a person can type it."""
    monkeypatch.chdir(tmp_path)
    assert quickstart.printed("train.py") == f"{sys.executable} train.py"
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert quickstart.printed("train.py", "a b") == ".venv/bin/python train.py 'a b'"


def test_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="repository's root"):
        quickstart.main()


@pytest.mark.slow
def test_the_next_command_works(programs, capsys):
    quickstart.main()
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    done = call(*words[2:], "--plan")
    assert done.returncode == 0, done.stderr
