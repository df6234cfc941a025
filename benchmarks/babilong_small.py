"""BABILong with real bAbI questions in real books: LM2, Titans, RMT, and a baseline without memory.

    python -m benchmarks.babilong_small --babi-dir BABI/en-10k --books-dir BOOKS

Trains the presets of configs/babilong_small.py, evaluates them on the same questions, and writes one table. Runs are
in runs/<preset>. The same command resumes: finished runs are not trained again, interrupted ones continue. Rows of
other presets in the table's .json are kept. A run takes about an hour on one core.
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
from lm2_jax.evaluation.names import model_name
from lm2_jax.presets import babilong_small
from lm2_jax.training.workdir import check_owner

RUNS = pathlib.Path("runs")


@dataclasses.dataclass(frozen=True)
class Command:
    """Options."""

    babi_dir: pathlib.Path
    """Folder of bAbI's files (en-10k)."""
    books_dir: pathlib.Path
    """Folder of books (.txt)."""
    presets: tuple[str, ...] = tuple(f"babilong_small{end}" for end in ("", "_mac", "_rmt", "_none"))
    """Presets to compare."""
    lengths: tuple[str, ...] = ("0k", "1k", "2k", "4k")
    """Lengths of the contexts."""
    samples: int = 500
    """Questions per length."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/babilong_small")
    """Table to write, as .json and .md."""


def run(*words: str) -> None:
    """Runs one of the project's programs."""
    print(f"$ python {' '.join(words)}", flush=True)
    if status := cli.run_program(*words):
        raise UserError(f"python {' '.join(words)} ended with status {status}", status=status)


def train(preset: str, command: Command) -> pathlib.Path:
    """Trains one preset, unless it is trained already."""
    workdir, config = RUNS / preset, babilong_small.PRESETS[preset]
    babi, books = str(command.babi_dir), str(command.books_dir)
    source = dataclasses.replace(config.data.source, babi_dir=babi, books_dir=books)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
    check_owner(epath.Path(workdir), config)  # an existing run may have been trained on other data
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
    """Markdown: a row per preset and task with the official and the strict verdict."""
    lengths = list(dict.fromkeys(cell["length"] for report in reports.values() for cell in report["results"]))
    head = ["model", "preset", "steps", "task", "questions", *lengths]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for preset, report in reports.items():
        cells = {(cell["task"], cell["length"]): cell for cell in report["results"]}
        for task in dict.fromkeys(task for task, _ in cells):
            here = [cells[task, length] for length in lengths]
            shown = [f"{100 * c['accuracy']:.1f} / {100 * c['accuracy_strict']:.1f}" for c in here]
            name = model_name(babilong_small.PRESETS[preset].model)
            first = [name, preset, f"{report['step']:,}", task, str(here[0]["samples"])]
            lines.append(f"| {' | '.join([*first, *shown])} |")
    return "\n".join(lines) + "\n"


def described(report: dict[str, Any]) -> str:
    """The data of a report, and the length of its prompts in GPT-2's tokens (and in the model's own)."""
    cells = {cell["length"]: cell for cell in report["results"]}
    counts = {length: (cell.get("mean_gpt2_tokens"), cell["mean_tokens"]) for length, cell in cells.items()}
    shown = [f"{name}: {'not counted' if n is None else f'{n:,.0f}'} ({own:,.0f})" for name, (n, own) in counts.items()]
    return f"{report['data']}; GPT-2 tokens (tokens of the model): {', '.join(shown)}"


def main() -> None:
    """Trains what is missing, evaluates, and writes the table."""
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
    """Writes the table of all reports so far, with the commands that produced them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = origin.markdown([(report["command"], report["machine"]) for report in reports.values()])
    data = "".join(f"- {line}\n" for line in dict.fromkeys(map(described, reports.values())))
    text = (
        "Accuracy in per cent, official verdict / strict verdict; one run of each model.\n\n"
        f"{table(reports)}\nData, and mean length of a prompt:\n\n{data}\nCommands:\n\n{made}"
    )
    out.with_suffix(".md").write_text(text)
    out.with_suffix(".json").write_text(json.dumps({"reports": reports}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
