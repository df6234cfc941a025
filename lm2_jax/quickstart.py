"""`make quickstart`: trains a small LM2 and a baseline without memory on the CPU, and compares what they remember.

It runs the commands that a person would type; `lm2 quickstart` does the same in any folder.
"""

import json
import pathlib
import shlex
import time
from typing import Any

from lm2_jax import cli
from lm2_jax.errors import UserError

RUNS = pathlib.Path("runs/quickstart")
PRESETS = {"quickstart": RUNS / "lm2", "quickstart_none": RUNS / "none"}
SEGMENTS, ROWS = 16, 256  # of the comparison; the rows are four times as long as in training


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
        raise UserError(f"none of {ROWS} held-out rows has a question about another segment: change ROWS", status=1)
    return 100 * correct / asked


def main() -> None:
    """Trains, compares, and prints what was saved where."""
    began = time.monotonic()
    print(
        "Two small language models read the same stories: who went where, between sentences of prose, with questions\n"
        "in between. One has LM2's memory. The baseline has no memory and sees only the current segment.\n"
        "You may interrupt this at any time: the same command resumes."
    )
    for preset, workdir in PRESETS.items():
        run("train", preset, "--workdir", str(workdir))
    out, workdirs = RUNS / "eval", [str(workdir) for workdir in PRESETS.values()]
    run(
        "eval", "recall", "--workdirs", *workdirs, "--segments", str(SEGMENTS), "--rows", str(ROWS),
        "--out", str(out),
    )  # fmt: skip
    run(
        "eval", "babilong", "--workdir", workdirs[0], "--baseline", workdirs[1], "--lengths", "0k", "1k",
        "--samples", "50", "--out", str(out),
    )  # fmt: skip
    results = json.loads((out / "recall.json").read_text())["results"]
    shown = [f"  {result['model']:<28}{accuracy(result, 1, 4):5.1f}%" for result in results]
    print(
        f"\nAccuracy on facts stated 1 to 4 segments before the question, rows of {SEGMENTS} segments:\n"
        + "\n".join(shown)
        + f"\nThat took {(time.monotonic() - began) / 60:.1f} minutes, one run of each model.\n"
        f"Saved: checkpoints in {workdirs[0]} and {workdirs[1]}; tables and pictures in {out}\n"
        f"(recall.png, babilong.png). TensorBoard: tensorboard --logdir {RUNS}\n"
        f"Next, the same model with a change of your own (all fields: {printed('train', 'quickstart', '--help')}):\n"
        f"  {printed('train', 'quickstart', '--workdir', 'runs/mine', '--model.memory.num-slots', '16')}"
    )


if __name__ == "__main__":
    cli.run(main)
