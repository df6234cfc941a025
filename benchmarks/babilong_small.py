"""BABILong on real bAbI questions in real books: LM2 beside Titans, RMT and the same decoder without memory.

    python -m benchmarks.babilong_small --babi-dir BABI/en-10k --books-dir BOOKS

Trains the presets of configs/babilong_small.py, asks each the same questions, and writes one table. Runs lie in
runs/<preset>; a finished one is not trained again and an interrupted one goes on, so the command can be stopped and
repeated at any time. Each run takes about an hour of one core, Titans three.
"""

import dataclasses
import json
import os
import pathlib
import platform
import sys
from typing import Any

import tyro
from etils import epath

from configs import babilong_small
from lm2_jax import cli
from lm2_jax.errors import UserError
from lm2_jax.training.workdir import check_owner

RUNS = pathlib.Path("runs")


@dataclasses.dataclass(frozen=True)
class Command:
    """Data and presets."""

    babi_dir: pathlib.Path
    """Folder of bAbI's files (en-10k)."""
    books_dir: pathlib.Path
    """Folder of books (.txt)."""
    presets: tuple[str, ...] = tuple(babilong_small.PRESETS)
    """What is compared."""
    lengths: tuple[str, ...] = ("0k", "1k", "2k", "4k")
    """Lengths of the prompts."""
    samples: int = 500
    """Questions of each length."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/babilong_small")
    """Where the table goes, as .json and .md."""


def run(*words: str) -> None:
    """One of the project's programs, to its end."""
    print(f"$ python {' '.join(words)}", flush=True)
    if status := cli.run_program(*words):
        raise UserError(f"python {' '.join(words)} ended with status {status}", status=status)


def train(preset: str, command: Command) -> pathlib.Path:
    """Trains one preset to its end, unless that is done."""
    workdir, config = RUNS / preset, babilong_small.PRESETS[preset]
    babi, books = str(command.babi_dir), str(command.books_dir)
    source = dataclasses.replace(config.data.source, babi_dir=babi, books_dir=books)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
    check_owner(epath.Path(workdir), config)  # what lies there may have been trained on something else
    if not (workdir / "checkpoints" / str(config.optim.steps)).is_dir():
        options = ("--data.source.babi-dir", babi, "--data.source.books-dir", books)
        run("train.py", preset, "--workdir", str(workdir), *options)
    return workdir


def evaluate(workdir: pathlib.Path, command: Command) -> dict[str, Any]:
    """The report of `eval.py babilong`."""
    data = ("--babi-dir", str(command.babi_dir), "--books-dir", str(command.books_dir))
    lengths, samples = ("--lengths", *command.lengths), ("--samples", str(command.samples))
    run("eval.py", "babilong", "--workdir", str(workdir), *data, *lengths, *samples)
    return json.loads((workdir / "eval" / "babilong.json").read_text())


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Markdown: one line for a preset and task, official and strict verdict."""
    lengths = list(dict.fromkeys(cell["length"] for report in reports.values() for cell in report["results"]))
    lines = [f"| preset | task | {' | '.join(lengths)} |", "|---" * (len(lengths) + 2) + "|"]
    for preset, report in reports.items():
        cells = {(cell["task"], cell["length"]): cell for cell in report["results"]}
        for task in dict.fromkeys(task for task, _ in cells):
            here = [cells[task, length] for length in lengths]
            shown = [f"{100 * c['accuracy']:.1f} / {100 * c['accuracy_strict']:.1f}" for c in here]
            lines.append(f"| {preset} | {task} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains what is missing, asks, and writes the table."""
    command = tyro.cli(Command, description=__doc__)
    if unknown := sorted(set(command.presets) - set(babilong_small.PRESETS)):
        raise UserError(f"unknown presets {unknown}; known: {list(babilong_small.PRESETS)}")
    reports: dict[str, dict[str, Any]] = {}
    for preset in command.presets:
        reports[preset] = evaluate(train(preset, command), command)
        write(reports, command)
    print(table(reports))


def write(reports: dict[str, dict[str, Any]], command: Command) -> None:
    """The table so far, with command and machine."""
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    typed = " ".join(["python -m benchmarks.babilong_small", *sys.argv[1:]])
    head = f"Answers right in per cent, official verdict / strict verdict, {command.samples} questions a cell"
    command.out.parent.mkdir(parents=True, exist_ok=True)
    command.out.with_suffix(".md").write_text(f"{head}; `{typed}`; {machine}.\n\n{table(reports)}")
    command.out.with_suffix(".json").write_text(json.dumps({"machine": machine, "reports": reports}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
