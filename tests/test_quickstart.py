"""The quickstart's commands and its last words; the programs themselves are stand-ins here."""

import json
import pathlib
import shlex
import sys

import pytest

from lm2_jax import PRESETS, cli, quickstart
from lm2_jax.commands import flags
from lm2_jax.errors import UserError
from lm2_jax.evaluation import SUITES
from tests.e2e.test_train_program import call


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """Records what would be run in an empty folder, and leaves the results of an evaluation."""
    ran: list[list[str]] = []
    scripts = len(cli.program_words("eval"))

    def run_program(*words: str) -> int:
        assert list(words[:scripts]) in (cli.program_words("train"), cli.program_words("eval"))
        words = (pathlib.Path(words[scripts - 1]).stem, *words[scripts:])
        ran.append(list(words))
        if words[:2] == ("eval", "recall"):
            results = [
                {"model": "LM2, block write (ours)", "asked": [9, 10, 10, 10, 10, 5], "right": [9, 10, 9, 8, 8, 5]},
                {"model": "baseline (no memory)", "asked": [9, 10, 10, 10, 10, 5], "right": [9, 2, 2, 2, 2, 5]},
            ]
            out = pathlib.Path(words[words.index("--out") + 1])
            out.mkdir(parents=True)
            (out / "recall.json").write_text(json.dumps({"results": results}))
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run_program", run_program)
    return ran


def test_quickstart(programs, capsys):
    quickstart.main([])
    printed = capsys.readouterr().out
    assert [words[:2] for words in programs] == [
        ["train", "quickstart"],
        ["train", "quickstart_none"],
        ["eval", "recall"],
        ["eval", "babilong"],
    ]
    assert all(words[1] in PRESETS for words in programs[:2])
    for words in programs[2:]:
        suite, typed = SUITES[words[1]], flags.split(words[2:])[1]
        flags.apply([(suite, flags.default_table(suite))], typed)
    for words in programs:
        assert f"$ {quickstart.printed(*words)}" in printed
    assert "LM2, block write (ours)      87.5%" in printed
    assert "baseline (no memory)         20.0%" in printed
    assert "tables and pictures in runs/quickstart/eval" in printed
    assert printed.splitlines()[-1].strip().startswith(f"{cli.program('train')} quickstart ")


def test_a_short_one_trains_less_in_folders_of_its_own(programs, capsys):
    quickstart.main(["--short"])
    assert all("--optim.steps" in words for words in programs[:2])
    assert all("runs/quickstart_short/lm2" in words for words in (programs[0], *programs[2:]))
    assert "these numbers only show that everything works" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--shrt: no such option\. Did you mean '--short'"):
        quickstart.main(["--shrt"])
    assert len(programs) == 4


def test_after_installation_the_quickstart_needs_no_scripts(programs, monkeypatch, capsys):
    """In any folder: `lm2 quickstart`."""
    monkeypatch.setattr(sys, "argv", ["lm2 quickstart"])
    monkeypatch.setattr(cli, "run_program", lambda *words: programs.append(list(words)) or 1)
    with pytest.raises(UserError, match="`lm2 train quickstart --workdir runs/quickstart/lm2` ended with status 1"):
        quickstart.main([])
    assert programs[0][:4] == ["-m", "lm2_jax", "train", "quickstart"]


@pytest.mark.slow
def test_the_next_command_works(programs, capsys):
    quickstart.main([])
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    done = call(*words[2:], "--plan")
    assert done.returncode == 0, done.stderr
