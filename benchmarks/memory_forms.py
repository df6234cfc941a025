"""Which form of LM2's bank learns to remember? Trains the arms of configs/probe.py and compares them.

    python -m benchmarks.memory_forms                                  # every arm, seed 0
    python -m benchmarks.memory_forms --arms probe_rmt probe_none --seeds 0 1 2 --out runs/probe/seeds

Runs lie in runs/probe/<arm>_<seed>; a finished one is not trained again and an interrupted one goes on, so the command
can be stopped and repeated at any time. The table is made of the runs that were asked for.
"""

import dataclasses
import json
import os
import pathlib
import platform
import sys

import numpy as np
import tyro
from etils import epath

from configs import probe, probe_titans
from lm2_jax import cli
from lm2_jax.errors import UserError
from lm2_jax.evaluation.recall import Result, measure
from lm2_jax.runs import load_run
from lm2_jax.training.workdir import check_owner

RUNS = pathlib.Path("runs/probe")
FORMS = tuple(probe.PRESETS)
RESULTS = pathlib.Path("benchmarks/results/memory_forms")
ARMS = {run.name: run for run in (*probe.ARMS, *probe_titans.ARMS)}


@dataclasses.dataclass(frozen=True)
class Command:
    """Arms and seeds to train."""

    arms: tuple[str, ...] = FORMS
    """Presets of configs/probe.py or configs/probe_titans.py; by default all of the former."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of parameters and data."""
    segments: tuple[int, ...] = (4, 16)
    """Lengths of the comparison: as in training, and four times that."""
    rows: int = 512
    """Held-out rows of each length."""
    out: pathlib.Path | None = None
    """Where the table goes, as .json and .md; None: benchmarks/results/memory_forms for every arm, else runs/probe."""

    @property
    def table(self) -> pathlib.Path:
        """`out`, or what stands for None: a table of all arms is not overwritten by one of a few."""
        return self.out or (RESULTS if set(FORMS) <= set(self.arms) else RUNS / "table")


def train(arm: str, seed: int) -> pathlib.Path:
    """Trains one run to its end, unless that is done."""
    workdir = RUNS / f"{arm}_{seed}"
    words = ["train.py", arm, "--workdir", str(workdir), "--data.seed", str(seed), "--train.seed", str(seed)]
    run = ARMS[arm]
    seeded = dataclasses.replace(
        run, data=dataclasses.replace(run.data, seed=seed), train=dataclasses.replace(run.train, seed=seed)
    )
    check_owner(epath.Path(workdir), seeded)  # what lies there may be a run of the arm as it once was
    if not (workdir / "checkpoints" / str(run.optim.steps)).is_dir():
        print(f"$ python {' '.join(words)}", flush=True)
        status = cli.run_program(*words)
        if status:
            raise UserError(f"the run {workdir} ended with status {status}", status=status)
    return workdir


def judge(workdir: pathlib.Path, segments: int, rows: int) -> Result:
    """The comparison of one run."""
    return measure(load_run(workdir), workdir, segments, rows)


def main() -> None:
    """Trains what is missing and writes the table."""
    command = tyro.cli(Command, description=__doc__)
    unknown = [arm for arm in command.arms if arm not in ARMS]
    if unknown:
        raise UserError(f"unknown arms {unknown}; known: {list(ARMS)}")
    results: dict[tuple[str, int], list[Result]] = {}
    for seed in command.seeds:
        for arm in command.arms:
            workdir = train(arm, seed)
            for segments in command.segments:
                results.setdefault((arm, segments), []).append(judge(workdir, segments, command.rows))
            write(results, command)
    print(table(results, command.segments))


def table(results: dict[tuple[str, int], list[Result]], lengths: tuple[int, ...]) -> str:
    """Markdown: one line an arm, mean and range over seeds."""
    head = [f"all, {length} segments" for length in lengths] + [f"told 1-4 back, {length}" for length in lengths]
    lines = [f"| arm | parameters | floats of state | seeds | {' | '.join(head)} |", "|---" * (len(head) + 4) + "|"]
    for arm in dict.fromkeys(arm for arm, _ in results):
        first = results[arm, lengths[0]]
        values = [[r.counts.accuracy() for r in results[arm, length]] for length in lengths]
        values += [[r.counts.accuracy(1, 4) for r in results[arm, length]] for length in lengths]
        shown = " | ".join(_shown([100 * value for value in column if value is not None]) for column in values)
        lines.append(f"| {arm} | {first[0].params:,} | {first[0].state_floats:,} | {len(first)} | {shown} |")
    return "\n".join(lines) + "\n"


def _shown(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def write(results: dict[tuple[str, int], list[Result]], command: Command) -> None:
    """The table so far, with the machine."""
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    command.table.parent.mkdir(parents=True, exist_ok=True)
    typed = " ".join(["python -m benchmarks.memory_forms", *sys.argv[1:]])
    text = f"Answers right, per cent; `{typed}`; {machine}.\n\n"
    command.table.with_suffix(".md").write_text(text + table(results, command.segments))
    rows = [
        {
            "arm": arm,
            "seed": command.seeds[index],
            "segments": segments,
            "parameters": result.params,
            "state_floats": result.state_floats,
            "asked": result.counts.asked.tolist(),
            "right": result.counts.right.tolist(),
        }
        for (arm, segments), per_seed in results.items()
        for index, result in enumerate(per_seed)
    ]
    command.table.with_suffix(".json").write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
