"""The table, the picture and the JSON of a comparison."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm2_jax.compare.protocol import inequalities
from lm2_jax.evaluation import report
from lm2_jax.figures import new_figure, to_png

COLOURS = 10


@dataclasses.dataclass(frozen=True)
class SeedResult:
    """One reported run."""

    seed: int
    workdir: str
    metrics: dict[str, float]
    """Held-out metrics at the end of training, such as `eval_answer_accuracy`."""
    results: list[dict[str, Any]]
    """Results of the suite, one for each length, and task; empty where the data does not suit it."""


@dataclasses.dataclass(frozen=True)
class PresetResult:
    """All runs of one preset."""

    preset: str
    model: str
    parameters: int
    state_floats: int
    tokens: int
    """Training tokens of a run."""
    steps: int
    learning_rate: float
    search: list[dict[str, Any]]
    """Preset, learning rate, seed and score of each run of the search; that of a run that diverged is None."""
    seeds: list[SeedResult]

    def columns(self) -> dict[str, list[float]]:
        """Values of every seed by the name of a column, in per cent but for losses."""
        found: dict[str, list[float]] = {}
        for seed in self.seeds:
            for name, title, factor in _METRICS:
                if name in seed.metrics:
                    found.setdefault(title, []).append(factor * seed.metrics[name])
            for result in seed.results:
                recall = f"recall, {result.get('segments')} segments"
                title = f"{result['task']}, {result['length']}" if "task" in result else recall
                found.setdefault(title, []).append(100 * result["accuracy"])
        return found


_METRICS = (
    ("eval_answer_accuracy", "held-out answers", 100.0),
    ("eval_answer_loss", "answer loss", 1.0),
    ("eval_text_loss", "text loss", 1.0),
)


def to_files(results: Sequence[PresetResult], command: str, machine: str) -> dict[str, bytes]:
    """compare.json, compare.md and compare.png."""
    document = {"command": command, "machine": machine, "results": [dataclasses.asdict(result) for result in results]}
    return {
        "compare.json": report.to_json(document),
        "compare.md": markdown(results, command, machine).encode(),
        "compare.png": picture(results),
    }


def markdown(results: Sequence[PresetResult], command: str, machine: str) -> str:
    """The table, what is not equal in it, and where it comes from."""
    columns = {name: None for result in results for name in result.columns()}
    head = ["model", "preset", "parameters", "floats of state", "steps", "rate", "seeds", *columns]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for result in results:
        cells = result.columns()
        fixed = [
            *(result.model, result.preset, f"{result.parameters:,}", f"{result.state_floats:,}", f"{result.steps:,}"),
            *(f"{result.learning_rate:g}", str(len(result.seeds))),
        ]
        lines.append("| " + " | ".join([*fixed, *(_cell(cells.get(name)) for name in columns)]) + " |")
    notes = ["Mean over seeds, lowest and highest in brackets; accuracies in per cent."]
    searched = [result for result in results if result.search]
    if searched:
        tried = sorted({entry["learning_rate"] for result in searched for entry in result.search})
        seeds = sorted({entry["seed"] for result in searched for entry in result.search})
        others = sorted(
            {entry["preset"] for result in searched for entry in result.search} - {r.preset for r in results}
        )
        notes.append(
            f"The learning rate of each preset was chosen from {', '.join(f'{rate:g}' for rate in tried)} by held-out "
            f"score with seeds {', '.join(map(str, seeds))}, which are not in the table."
            + (f" Presets that were tried and not chosen: {', '.join(others)}." if others else "")
        )
    else:
        notes.append("Learning rates were not searched: each preset has its own.")
    tokens = {result.preset: result.tokens for result in results}
    unequal = inequalities(tokens, {result.preset: result.parameters for result in results})
    notes += [f"Not equal: {what}." for what in unequal]
    if len(set(tokens.values())) == 1:
        notes.append(f"Every run was trained on {next(iter(tokens.values())):,} tokens.")
    return "\n".join([*lines, "", *notes, "", f"- `{command}`; {machine}", ""])


def _cell(values: Sequence[float] | None) -> str:
    if not values:
        return "-"
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    return f"{np.mean(values):.3g}{spread}"


def picture(results: Sequence[PresetResult]) -> bytes:
    """A panel for each column: every seed is a point, the mean a line."""
    columns = [name for name in dict.fromkeys(name for result in results for name in result.columns())]
    figure = new_figure(8, 0.6 + len(columns) * (0.5 + 0.32 * len(results)))
    panels = figure.subplots(max(1, len(columns)), 1, squeeze=False)[:, 0]
    names = [result.preset for result in results]
    for panel, name in zip(panels, columns, strict=False):
        for index, result in enumerate(results):
            values = result.columns().get(name, [])
            panel.plot(values, [index] * len(values), "o", color=f"C{index % COLOURS}", alpha=0.6)
            if values:
                panel.plot([np.mean(values)] * 2, [index - 0.3, index + 0.3], color=f"C{index % COLOURS}", linewidth=2)
        panel.set_yticks(range(len(results)), names)
        panel.set_ylim(len(results) - 0.5, -0.5)
        panel.set_title(name if "loss" in name else f"{name} (per cent)", loc="left", fontsize="medium")
        panel.grid(axis="x", alpha=0.3)
    return to_png(figure)
