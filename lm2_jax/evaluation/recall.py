"""The recall suite: answers by how many segments ago their fact was last told, on held-out text of a run's own kind."""

import dataclasses
import itertools
import os
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
import rich.console
from etils import epath

from lm2_jax.data.pipeline import batches
from lm2_jax.errors import UserError
from lm2_jax.evaluation import report
from lm2_jax.evaluation.suite import Suite
from lm2_jax.folders import prepare_folder
from lm2_jax.loss import token_losses
from lm2_jax.state import state_floats

COLUMNS = ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (8, 8), (16, 16), (32, 32), (1, 4))  # first and last distance


class Counts(NamedTuple):
    """Questions by distance in segments."""

    asked: np.ndarray
    right: np.ndarray

    def accuracy(self, first: int = 0, last: int | None = None) -> float | None:
        """Share of right answers among distances first..last, None where nothing was asked."""
        end = None if last is None else last + 1
        asked, right = self.asked[first:end].sum(), self.right[first:end].sum()
        return float(right / asked) if asked else None


def count_answers(run: Any, segments: int, rows: int, batch_rows: int = 64) -> Counts:
    """Asks a run the questions of `rows` held-out rows of `segments` segments.

    Args:
      run: what `lm2_jax.load_run` gives; its source must say how far back answers lie.
      segments: K of each row; may be more than in training.
      rows: rounded up to whole batches.
      batch_rows: rows read side by side.
    """
    config, model = run.config, run.model
    data = dataclasses.replace(
        config.data, rows=batch_rows, segments=(segments,), stage_steps=(), vary_segments=False, carry_state=False
    )
    source = data.source.build(run.tokenizer, config.model.segment_tokens, data.seed)
    held_out = batches(data, source, start_step=0, process_index=0, process_count=1, held_out=True)

    @jax.jit
    def predict(params: Any, batch: Any) -> jax.Array:
        state = model.init_state(batch.tokens.shape[0])
        out = model.apply({"params": params}, batch.tokens, state, batch.reset, batch.valid, method="forward")
        return token_losses(model, params, out.hidden, batch.targets, config.loss.time_chunk)[1]

    asked, right = np.zeros(segments, np.int64), np.zeros(segments, np.int64)
    for batch in itertools.islice(held_out, -(-rows // batch_rows)):
        correct_BS = np.asarray(predict(run.params, batch)) == batch.targets
        known_BS = batch.distance >= 0
        asked += np.bincount(batch.distance[known_BS], minlength=segments)
        right += np.bincount(batch.distance[known_BS & correct_BS], minlength=segments)
    if not asked.any():
        raise UserError(
            f"recall: the source {data.source.kind!r} of {config.name!r} asks no question whose distance is known; "
            "train on data.source.layout 'interleaved'"
        )
    return Counts(asked, right)


@dataclasses.dataclass(frozen=True)
class Recall(Suite):
    """Accuracy by the age of the fact in segments, for one run or several. Writes recall.json, .md and .png."""

    kind: ClassVar[str] = "recall"

    workdirs: tuple[str, ...]
    """Workdirs of the runs to compare."""
    segments: tuple[int, ...] = (4, 16)
    """Lengths of the rows, in segments."""
    rows: int = 512
    """Rows of each length."""
    out: str | None = None
    """Where the report goes; default: WORKDIR/eval of the first run."""

    def __post_init__(self) -> None:
        if not self.workdirs:
            raise ValueError("workdirs is empty")
        if self.rows < 1 or min(self.segments, default=0) < 1:
            raise ValueError(f"rows and segments must be at least 1, got {self.rows} and {self.segments}")

    def main(self) -> None:
        """Evaluates all runs and writes the report."""
        import lm2_jax

        runs = {workdir: lm2_jax.load_run(workdir) for workdir in self.workdirs}
        out = prepare_folder(epath.Path(self.workdirs[0]) / "eval" if self.out is None else self.out)
        results = [
            measure(run, workdir, segments, self.rows) for segments in self.segments for workdir, run in runs.items()
        ]
        console = rich.console.Console(highlight=False)
        for path in show(results, out, console):
            console.print(f"wrote {path}", soft_wrap=True)


class Result(NamedTuple):
    """One run at one length."""

    name: str  # of the preset
    workdir: str
    step: int
    params: int
    state_floats: int  # carried across a segment border, of one row
    segments: int
    counts: Counts


def measure(run: Any, workdir: epath.PathLike, segments: int, rows: int) -> Result:
    """`count_answers` with what a comparison has to state; `workdir` is where the run was loaded from."""
    params = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    floats = state_floats(jax.eval_shape(lambda: run.model.init_state(1)))
    counts = count_answers(run, segments, rows)
    return Result(run.config.name, os.fspath(workdir), int(run.step), params, floats, segments, counts)


def show(results: list[Result], out: epath.Path, console: rich.console.Console) -> list[epath.Path]:
    """Prints a table for each length and writes the files; returns their paths."""
    parts = []
    for segments in dict.fromkeys(result.segments for result in results):
        chosen = [result for result in results if result.segments == segments]
        cells = {
            (label, name): value for label, result in _labelled(chosen).items() for name, value in _columns(result)
        }
        console.print(f"\nAnswers by the age of the fact, in segments; rows of {segments} segments (per cent)")
        console.print(report.console_table(cells, "run", means=False))
        parts.append(f"Rows of {segments} segments:\n\n{_markdown(chosen)}")
    text = "# Recall: accuracy in per cent by the age of the fact in segments\n\n" + "\n".join(parts)
    files = {
        "recall.json": report.to_json(_document(results)),
        "recall.md": text.encode(),
        "recall.png": _picture(results),
    }
    return report.write_files(out, files)


def _labelled(results: list[Result]) -> dict[str, Result]:
    """Results of one length by the names of their presets; where a preset occurs twice, by their workdirs."""
    names = [result.name for result in results]
    return {result.workdir if names.count(result.name) > 1 else result.name: result for result in results}


def _columns(result: Result) -> list[tuple[str, float]]:
    """Per cent over all, and by groups of distances."""
    columns = [("all", result.counts.accuracy())]
    for first, last in COLUMNS:
        columns.append((f"{first}" if first == last else f"{first}-{last}", result.counts.accuracy(first, last)))
    return [(name, 100 * value) for name, value in columns if value is not None]


def _markdown(results: list[Result]) -> str:
    names = [name for name, _ in _columns(results[0])]
    lines = ["| run | parameters | floats of state | " + " | ".join(names) + " |", "|---" * (len(names) + 3) + "|"]
    for label, result in _labelled(results).items():
        values = dict(_columns(result))
        shown = " | ".join(f"{values[name]:.1f}" if name in values else "-" for name in names)
        lines.append(f"| {label} | {result.params:,} | {result.state_floats:,} | {shown} |")
    return "\n".join(lines) + "\n"


def _document(results: list[Result]) -> dict[str, Any]:
    rows = [
        {
            "preset": result.name,
            "workdir": result.workdir,
            "step": result.step,
            "parameters": result.params,
            "state_floats": result.state_floats,
            "segments": result.segments,
            "accuracy": result.counts.accuracy(),
            "asked": result.counts.asked.tolist(),
            "right": result.counts.right.tolist(),
        }
        for result in results
    ]
    return {"suite": "recall", "results": rows}


def _picture(results: list[Result]) -> bytes:
    """Curves of accuracy over distance, at the longest rows; where fewer than 20 questions were asked, none."""
    longest = max(result.segments for result in results)
    curves = {}
    for label, result in _labelled([result for result in results if result.segments == longest]).items():
        ages = np.flatnonzero(result.counts.asked >= 20)
        curves[label] = (ages, 100 * result.counts.right[ages] / result.counts.asked[ages])
    return report.line_plot(
        curves,
        f"What is remembered, rows of {longest} segments",
        "segments since the fact was told",
        "answers right, per cent",
    )
