"""The table of benchmarks/grafted.py."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import origin
from benchmarks.grafted_arms import MEMORIES, STARTS

Row = dict[str, Any]  # of the .json: one arm and seed


def identity(row: Row) -> tuple[int, int, int]:
    """Memory, start and seed of a row, as a sort key in the table's order."""
    return list(MEMORIES).index(row["memory"]), list(STARTS).index(row["start"]), row["seed"]


def table(rows: Sequence[Row]) -> str:
    """Markdown: a row per arm, mean and range over seeds, by the official verdict."""
    lengths = list(dict.fromkeys(cell["length"] for row in rows for cell in row["results"]))
    head = ["model", "start", "parameters", "trained", "floats of state", "steps", "rate", "seeds", *lengths]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key in dict.fromkeys(identity(row)[:2] for row in sorted(rows, key=identity)):
        of_arm = [row for row in rows if identity(row)[:2] == key]
        first = of_arm[0]
        counts = [f"{first[name]:,}" for name in ("parameters", "trained_parameters", "state_floats", "steps")]
        cells = [_shown([_accuracy(row, length) for row in of_arm]) for length in lengths]
        diverged = sum(row["diverged"] for row in of_arm)
        seeds = f"{len(of_arm)}, {diverged} diverged" if diverged else str(len(of_arm))
        fixed = [first["model"], STARTS[first["start"]], *counts, f"{first['learning_rate']:g}", seeds]
        lines.append(f"| {' | '.join([*fixed, *cells])} |")
    return "\n".join(lines) + "\n"


def _accuracy(row: Row, length: str) -> float | None:
    return next((100 * cell["accuracy"] for cell in row["results"] if cell["length"] == length), None)


def _shown(found: Sequence[float | None]) -> str:
    values = [value for value in found if value is not None]
    if not values:
        return "-"
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def write(rows: Sequence[Row], out: pathlib.Path) -> None:
    """Writes the table of all rows so far, with the commands that produced them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = origin.markdown([(row["command"], row["machine"]) for row in rows])
    samples = sorted({cell["samples"] for row in rows for cell in row["results"]})
    data = sorted({", ".join(row["test_books"]) for row in rows})
    notes = [
        f"Accuracy in per cent, official verdict; mean and range over seeds. Questions of each length: "
        f"{', '.join(map(str, samples))}.",
        f"Checkpoint: {', '.join(sorted({row['checkpoint'] for row in rows}))}. Books of the test, which training "
        f"never read: {'; '.join(data)}.",
        "The rate of each arm was chosen from those in its search by the loss of answers, with a development seed.",
    ]
    text = "\n\n".join([*notes, table(rows), made])
    out.with_suffix(".md").write_text(text)
    out.with_suffix(".json").write_text(json.dumps({"results": list(rows)}, indent=1) + "\n")
