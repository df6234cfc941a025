"""Compares the forms of LM2's bank, and other memories, on the recall task of configs/probe.py.

    python -m benchmarks.memory_forms                                  # every arm, seed 0
    python -m benchmarks.memory_forms --arms probe_rmt probe_none --seeds 0 1 2 --out runs/probe/seeds

Runs are in runs/probe/<arm>_<seed>. The same command resumes: finished runs are not trained again, interrupted ones
continue. Rows of other arms and seeds in the table's .json are kept.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import tyro
from etils import epath

from benchmarks import origin
from lm2_jax import cli
from lm2_jax.errors import UserError
from lm2_jax.evaluation.answerer import RunAnswerer
from lm2_jax.evaluation.names import model_name
from lm2_jax.evaluation.recall import Result, measure
from lm2_jax.presets import probe, probe_titans
from lm2_jax.training.workdir import check_owner

RUNS = pathlib.Path("runs/probe")
FORMS = tuple(probe.PRESETS)
RESULTS = pathlib.Path("benchmarks/results/memory_forms")
ARMS = {run.name: run for run in (*probe.ARMS, *probe_titans.ARMS)}
Row = dict[str, Any]  # of the .json: one arm, seed and length


@dataclasses.dataclass(frozen=True)
class Command:
    """Options."""

    arms: tuple[str, ...] = FORMS
    """Presets of configs/probe.py or configs/probe_titans.py; default: all of the former."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of parameters and data."""
    segments: tuple[int, ...] = (4, 16)
    """Row lengths of the evaluation, in segments; training uses 4."""
    rows: int = 512
    """Held-out rows per length."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/memory_forms")
    """Table to write, as .json and .md."""


def train(arm: str, seed: int) -> pathlib.Path:
    """Trains one run, unless it is trained already."""
    workdir = RUNS / f"{arm}_{seed}"
    words = ["train.py", arm, "--workdir", str(workdir), "--data.seed", str(seed), "--train.seed", str(seed)]
    run = ARMS[arm]
    seeded = dataclasses.replace(
        run, data=dataclasses.replace(run.data, seed=seed), train=dataclasses.replace(run.train, seed=seed)
    )
    check_owner(epath.Path(workdir), seeded)  # an existing run may be of an older definition of the arm
    if not (workdir / "checkpoints" / str(run.optim.steps)).is_dir():
        print(f"$ python {' '.join(words)}", flush=True)
        status = cli.run_program(*words)
        if status:
            raise UserError(f"the run {workdir} ended with status {status}", status=status)
    return workdir


def evaluate(arm: str, seed: int, workdir: pathlib.Path, segments: int, rows: int) -> Row:
    """Evaluates one run at one row length."""
    result: Result = measure(RunAnswerer.load(workdir), segments, rows)
    return {
        "arm": arm,
        "seed": seed,
        "segments": segments,
        "command": origin.typed("benchmarks.memory_forms"),
        "machine": origin.cores(),
        "parameters": result.params,
        "state_floats": result.state_floats,
        "asked": result.counts.asked.tolist(),
        "right": result.counts.correct.tolist(),
    }


def identity(row: Row) -> tuple[int, str, int, int]:
    """The arm, seed and length of a row, as a sort key in the table's order."""
    known = list(ARMS)
    return known.index(row["arm"]), row["arm"], row["seed"], row["segments"]


def main() -> None:
    """Trains what is missing, evaluates, and writes the table."""
    command = tyro.cli(Command, description=__doc__)
    unknown = [arm for arm in command.arms if arm not in ARMS]
    if unknown:
        raise UserError(f"unknown arms {unknown}; known: {list(ARMS)}")
    file = command.out.with_suffix(".json")
    held = json.loads(file.read_text())["results"] if file.exists() else []
    rows = {identity(row): row for row in held if row["arm"] in ARMS}
    for seed in command.seeds:
        for arm in command.arms:
            workdir = train(arm, seed)
            for segments in command.segments:
                row = evaluate(arm, seed, workdir, segments, command.rows)
                rows[identity(row)] = row
            write([rows[key] for key in sorted(rows)], command.out)
    print(table(list(rows.values())))


def share(row: Row, first: int | None = None, last: int | None = None) -> float | None:
    """Accuracy in per cent at the distances `first` to `last`; None if there are no such questions."""
    span = slice(first, None if last is None else last + 1)
    asked = sum(row["asked"][span])
    return 100 * sum(row["right"][span]) / asked if asked else None


def table(rows: list[Row]) -> str:
    """Markdown: a row per arm, mean and range over seeds."""
    lengths = sorted({row["segments"] for row in rows})
    head = [f"all, {length} segments" for length in lengths] + [
        f"distance 1-4, {length} segments" for length in lengths
    ]
    lines = [
        f"| model | arm | parameters | floats of state | seeds | {' | '.join(head)} |",
        "|---" * (len(head) + 5) + "|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in sorted(rows, key=identity)):
        of_arm = [row for row in rows if row["arm"] == arm]
        spans = [(length, *span) for span in ((None, None), (1, 4)) for length in lengths]
        shown = [_shown([share(r, *span) for r in of_arm if r["segments"] == length]) for length, *span in spans]
        first, seeds = of_arm[0], len({row["seed"] for row in of_arm})
        counts = f"{first['parameters']:,} | {first['state_floats']:,} | {seeds}"
        lines.append(f"| {model_name(ARMS[arm].model)} | {arm} | {counts} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _shown(found: list[float | None]) -> str:
    values = [value for value in found if value is not None]
    if not values:
        return "-"
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def write(rows: list[Row], out: pathlib.Path) -> None:
    """Writes the table of all rows so far, with the commands that produced them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = origin.markdown([(row["command"], row["machine"]) for row in rows])
    text = f"Accuracy in per cent; mean and range over seeds. Distance is in segments.\n\n{table(rows)}\n{made}"
    out.with_suffix(".md").write_text(text)
    out.with_suffix(".json").write_text(json.dumps({"results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
