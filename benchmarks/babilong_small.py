"""BABILong on real bAbI questions in real books: LM2 beside Titans, RMT and the same decoder without memory.

    python -m benchmarks.babilong_small --babi-dir BABI/en-10k --books-dir BOOKS

Trains the presets of configs/babilong_small.py, asks each the same questions, and writes one table. Runs lie in
runs/<preset>; a finished one is not trained again and an interrupted one goes on, so the command can be stopped and
repeated at any time; what the table's .json holds of other presets stays. Each run takes about an hour of one core.
"""

import dataclasses
import json
import pathlib
from typing import Any

import tyro
from etils import epath

from benchmarks import origin
from lm2_jax import cli
from lm2_jax.errors import UserError
from lm2_jax.presets import babilong_small
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
    report = json.loads((workdir / "eval" / "babilong.json").read_text())
    return {"command": origin.typed("benchmarks.babilong_small"), "machine": origin.cores(), **report}


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Markdown: one line for a preset and task, official and strict verdict, with steps and questions."""
    lengths = list(dict.fromkeys(cell["length"] for report in reports.values() for cell in report["results"]))
    head = ["preset", "steps", "task", "questions", *lengths]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for preset, report in reports.items():
        cells = {(cell["task"], cell["length"]): cell for cell in report["results"]}
        for task in dict.fromkeys(task for task, _ in cells):
            here = [cells[task, length] for length in lengths]
            shown = [f"{100 * c['accuracy']:.1f} / {100 * c['accuracy_strict']:.1f}" for c in here]
            first = [preset, f"{report['step']:,}", task, str(here[0]["samples"])]
            lines.append(f"| {' | '.join([*first, *shown])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains what is missing, asks, and writes the table."""
    command = tyro.cli(Command, description=__doc__)
    if unknown := sorted(set(command.presets) - set(babilong_small.PRESETS)):
        raise UserError(f"unknown presets {unknown}; known: {list(babilong_small.PRESETS)}")
    file = command.out.with_suffix(".json")
    held = json.loads(file.read_text())["reports"] if file.exists() else {}
    for preset in command.presets:
        held[preset] = evaluate(train(preset, command), command)
        reports = {name: held[name] for name in babilong_small.PRESETS if name in held}
        write(reports, command.out)
    print(table(held))


def write(reports: dict[str, dict[str, Any]], out: pathlib.Path) -> None:
    """The table so far, with what made each part of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = origin.told([(report["command"], report["machine"]) for report in reports.values()])
    text = f"Answers right in per cent, official verdict / strict verdict.\n\n{table(reports)}\n{made}"
    out.with_suffix(".md").write_text(text)
    out.with_suffix(".json").write_text(json.dumps({"reports": reports}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
