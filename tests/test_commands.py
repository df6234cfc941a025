"""Every command of the pages and of the help texts is accepted by the program that it calls."""

import pathlib

import pytest

from tests import commands
from tests.commands import ROOT, in_page, in_source, problems, script_problems
from tests.test_docs import pages

SOURCES = [path for folder in ("lm2_jax", "benchmarks", "tests/campaign") for path in (ROOT / folder).rglob("*.py")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty present folder, with the inputs that this repository has."""
    for name in ("README.md",):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", pages())
def test_commands_of_a_page_are_accepted(page, folder):
    offenders = [f"{page}: {what}" for found in in_page(page, pages()[page]) for what in problems(found)]
    assert not offenders, "\n".join(offenders)


def test_commands_of_help_texts_are_accepted(folder):
    found = {each for path in SOURCES for each in in_source(name(path), path.read_text())}
    assert len(found) > 20, found
    offenders = [f"{each.place}: {what}" for each in sorted(found) for what in problems(each)]
    assert not offenders, "\n".join(offenders)


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def test_commands_are_found():
    """Where the pages are written in another way, the search must follow."""
    scripts = [found.script for page, text in pages().items() for found in in_page(page, text)]
    assert len(scripts) > 80
    called = {word for script in scripts for words in commands.simple_commands(script) for word in words[:3]}
    programs = {"train", "eval", "generate", "import", "export", "inspect", "compare", "list"}
    missing = {"train.py", "eval.py", "generate.py", "-m", "make", "pip", "gcloud", *programs} - called
    assert not missing, missing


WRONG = {
    "python train.py lm2_tyny": "unknown preset",
    "python train.py lm2_tiny --optim.step 4": "optim.step",
    "python train.py lm2_tiny --model.memory.num-slots many": "expected a whole number",
    "lm2 train none_tiny --model.memory.num-slots 4": "no such option",
    "lm2 trane lm2_tiny": "no program",
    "lm2 compare lm2_tiny none_tyny --out o": "none_tyny",
    "lm2 compare lm2_tiny --out o -- --optim.step 4": "optim.step",
    "lm2 import a.gguf --workdir w --memory lm2_tyny": "lm2_tyny",
    "lm2 export --workdir w --outt o": "outt",
    "lm2 inspect --workdir w --text README.md --quest x": "quest",
    "python eval.py recal --workdirs w": "unknown suite",
    "python eval.py recall --workdir w": "workdir",
    "python generate.py --workdir w --promt x": "promt",
    "python -m lm2_jax.memory_file look m": "look",
    "python -m lm2_jax.data.convert --text c --outt o": "outt",
    "python -m benchmarks.use --onli tiny": "onli",
    "python -m benchmarks.nothing": "no module",
    "python -m tests.campaign kil": "kil",
    "python -m pytest tests/nothing.py": "no tests",
    "make qickstart": "no target",
    'pip install ".[tqu]"': "no extra",
    "pip install -r requirements-gpu.txt": "no file",
    "gclud compute": "no checker",
    "git clone 'x": "unexpected EOF",
    'gcloud ssh NAME --command "cd a && python train.py lm2_tyny"': "unknown preset",
    "for m in lm2 none; do\n  python train.py ${m}_tiny --optim.step 4\ndone": "optim.step",
}


@pytest.mark.parametrize("script", WRONG)
def test_a_wrong_command_is_found(script, folder):
    found = script_problems(script)
    assert len(found) == 1
    assert WRONG[script] in found[0]
