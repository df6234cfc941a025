"""`make quickstart`: trains a small LM2 and a baseline without memory on the CPU, and compares what they remember.

It runs the commands that a person would type; `lm2 quickstart` does the same in any folder. With `--short` each model
is trained for 20 steps, which shows that everything works, and nothing about memories.
"""

import json
import pathlib
import shlex
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from lm2_jax import cli
from lm2_jax.arguments import ArgumentParser
from lm2_jax.errors import UserError

PRESETS = {"quickstart": "lm2", "quickstart_none": "none"}  # and the folder of each
SEGMENTS = 16  # of the comparison; the rows are four times as long as in training


class Size(NamedTuple):
    """How much is trained and asked."""

    runs: pathlib.Path
    options: list[str]  # of each training
    rows: int  # held out, of the comparison
    samples: int  # questions of BABILong for each task and length


FULL = Size(pathlib.Path("runs/quickstart"), [], 256, 50)
SHORT = Size(pathlib.Path("runs/quickstart_short"), ["--optim.steps", "20", "--optim.warmup-steps", "2"], 16, 2)


def run(program: str, *words: str) -> None:
    """Prints a command and runs it.

    Raises:
      UserError: it ended with another status than 0.
    """
    shown = printed(program, *words)
    print(f"\n$ {shown}", flush=True)
    status = cli.run_program(*cli.program_words(program), *words)
    if status:
        raise UserError(f"`{shown}` ended with status {status}", status=status)


def printed(program: str, *words: str) -> str:
    """The command of a program as it can be typed here."""
    return f"{cli.program(program)} {shlex.join(words)}"


def accuracy(result: dict[str, Any], first: int, last: int) -> float:
    """Per cent of correct answers at the distances `first` to `last` of one row of recall.json."""
    asked, correct = (sum(result[name][first : last + 1]) for name in ("asked", "right"))
    if not asked:
        raise UserError("no held-out row has a question about another segment", status=1)
    return 100 * correct / asked


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, compares, and prints what was saved where."""
    parser = ArgumentParser(prog=cli.program("quickstart"), description=__doc__)
    parser.add_argument("--short", action="store_true", help="train for 20 steps: a test of the installation")
    size = SHORT if parser.parse_args(arguments).short else FULL
    began = time.monotonic()
    print(
        "Two small language models read the same stories: who went where, between sentences of prose, with questions\n"
        "in between. One has LM2's memory. The baseline has no memory and sees only the current segment.\n"
        "You may interrupt this at any time: the same command resumes."
    )
    workdirs = [str(size.runs / folder) for folder in PRESETS.values()]
    for preset, workdir in zip(PRESETS, workdirs, strict=True):
        run("train", preset, "--workdir", workdir, *size.options)
    out = size.runs / "eval"
    run(
        "eval", "recall", "--workdirs", *workdirs, "--segments", str(SEGMENTS), "--rows", str(size.rows),
        "--out", str(out),
    )  # fmt: skip
    run(
        "eval", "babilong", "--workdir", workdirs[0], "--baseline", workdirs[1], "--lengths", "0k", "1k",
        "--samples", str(size.samples), "--out", str(out),
    )  # fmt: skip
    results = json.loads((out / "recall.json").read_text())["results"]
    shown = [f"  {result['model']:<28}{accuracy(result, 1, 4):5.1f}%" for result in results]
    print(
        f"\nAccuracy on facts stated 1 to 4 segments before the question, rows of {SEGMENTS} segments:\n"
        + "\n".join(shown)
        + "\nTwenty steps are too few to learn from: these numbers only show that everything works." * (size is SHORT)
        + f"\nThat took {(time.monotonic() - began) / 60:.1f} minutes, one run of each model.\n"
        f"Saved: checkpoints in {workdirs[0]} and {workdirs[1]}; tables and pictures in {out}\n"
        f"(recall.png, babilong.png). TensorBoard: tensorboard --logdir {size.runs}\n"
        f"Next, the same model with a change of your own (all fields: {printed('train', 'quickstart', '--help')}):\n"
        f"  {printed('train', 'quickstart', '--workdir', 'runs/mine', '--model.memory.num-slots', '16')}"
    )


if __name__ == "__main__":
    cli.run(main)
