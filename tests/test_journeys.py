"""The first hours of new users: the commands that programs print are typed as they stand, one after the other."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PRINTED = re.compile(r"^ {4}(\S*python\S*|lm2) (.+)$", re.M)


def typed(command: str, folder: pathlib.Path) -> str:
    """The output of a command that must end well, typed in a folder."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "PATH": os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]),
    }
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def documented(page: str, words: str) -> str:
    """The command of a page that contains these words."""
    lines = (ROOT / page).read_text().splitlines()
    (found,) = [line.strip() for line in lines if words in line and line.startswith("    ")]
    return found.replace(" train.py ", f" {ROOT / 'train.py'} ")


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "mytexts"
    folder.mkdir()
    pages = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    for number, text in enumerate(pages[:4]):
        (folder / f"{number}.txt").write_text(text)
    return tmp_path


SHORT = "--optim.steps 6 --optim.warmup-steps 2 --train.eval-batches 1 --workdir runs/mine"


@pytest.mark.slow
def test_own_text_in_one_command_and_all_that_it_prints(texts):
    """docs/data.md's first command; then each command that the run prints at its end."""
    output = typed(f"{documented('docs/data.md', 'text_tiny --text mytexts/')} {SHORT}", texts)
    printed = [" ".join(found) for found in PRINTED.findall(output)]
    assert [re.search(r"(eval|generate)", command).group() for command in printed] == ["eval", "generate"]
    perplexity, text = (typed(command, texts) for command in printed)
    assert "perplexity" in perplexity
    assert len(text) > 1  # after six steps it need not be a word
    again = typed(f"{documented('docs/data.md', 'text_tiny --text mytexts/')} {SHORT}", texts)
    assert "finished" in again


@pytest.mark.slow
def test_a_memory_is_evaluated_by_what_its_run_prints(tmp_path):
    output = typed(f"{sys.executable} {ROOT / 'train.py'} lm2_tiny {SHORT}", tmp_path)
    assert re.search(r"^Live curves: tensorboard --logdir \S*runs/mine ", output, re.M)
    assert (tmp_path / "runs" / "mine" / "curves.png").is_file()
    (command,) = [" ".join(found) for found in PRINTED.findall(output)]
    assert "recall" in command
    typed(f"{command} --rows 64", tmp_path)
    assert (tmp_path / "runs" / "mine" / "eval" / "recall.md").is_file()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("lm2", path=str(pathlib.Path(sys.executable).parent)) is None, reason="not installed")
def test_the_installed_command_prints_itself(texts):
    output = typed(f"lm2 train text_tiny --text mytexts/ {SHORT}", texts)
    printed = [" ".join(found) for found in PRINTED.findall(output)]
    assert printed
    assert all(command.startswith("lm2 ") for command in printed)
