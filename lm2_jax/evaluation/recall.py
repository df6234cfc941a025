"""The recall suite: accuracy by distance, the number of segments since the fact was last stated, on held-out text."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from lm2_jax.data.base import Source
from lm2_jax.data.pipeline import batches
from lm2_jax.errors import UserError
from lm2_jax.evaluation import report
from lm2_jax.evaluation.answerer import RunAnswerer
from lm2_jax.evaluation.names import distinct_names
from lm2_jax.evaluation.suite import Evaluation, Output, Suite
from lm2_jax.state import state_floats

COLUMNS = ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (8, 8), (16, 16), (32, 32), (1, 4))  # first and last distance
LEAST_ASKED = 20  # questions at a distance that the picture shows


class Counts(NamedTuple):
    """Questions by distance in segments."""

    asked: np.ndarray
    correct: np.ndarray
    most_frequent: float = 0.0  # share of the most frequent answer: the accuracy of always giving that one

    def accuracy(self, first: int = 0, last: int | None = None) -> float | None:
        """Share of correct answers at distances first..last; None if there were no questions."""
        end = None if last is None else last + 1
        asked, correct = self.asked[first:end].sum(), self.correct[first:end].sum()
        return float(correct / asked) if asked else None


class Result(NamedTuple):
    """One run at one row length."""

    name: str  # what the model is
    preset: str
    workdir: str
    step: int
    params: int
    state_floats: int  # carried from segment to segment, per row
    trained_segments: int  # longest rows in training
    segments: int
    counts: Counts


def open_source(answerer: RunAnswerer) -> Source:
    """The source of the run's training data, whose held-out part is read.

    Raises:
      UserError: its files are missing.
    """
    config, tokenizer = answerer.run.config, answerer.run.tokenizer
    return config.data.source.build(tokenizer, config.model.segment_tokens, config.data.seed)


def count_answers(
    answerer: RunAnswerer, segments: int, rows: int, batch_rows: int = 64, source: Source | None = None
) -> Counts:
    """Counts the correct answers in held-out rows.

    Args:
      answerer: the run; its source must give the distance of answers.
      segments: segments of each row; may be more than in training.
      rows: rounded up to full batches.
      batch_rows: rows of a batch.
      source: what `open_source` gives; None: it is opened here.
    Raises:
      UserError: the source has no questions with a known distance.
    """
    config = answerer.run.config
    data = dataclasses.replace(
        config.data, rows=batch_rows, segments=(segments,), stage_steps=(), vary_segments=False, carry_state=False
    )
    held_out = batches(data, open_source(answerer) if source is None else source, held_out=True)
    asked, correct = np.zeros(segments, np.int64), np.zeros(segments, np.int64)
    answers: list[np.ndarray] = []
    for batch in itertools.islice(held_out, -(-rows // batch_rows)):
        is_correct_BS = answerer.predict(batch) == batch.targets
        known_BS = batch.distance >= 0
        asked += np.bincount(batch.distance[known_BS], minlength=segments)
        correct += np.bincount(batch.distance[known_BS & is_correct_BS], minlength=segments)
        answers.append(batch.targets[known_BS])
    if not asked.any():
        raise UserError(
            f"recall: the source {config.data.source.kind!r} of {config.name!r} has no questions with a known "
            "distance; evaluate a run that was trained with data.source.layout 'interleaved'"
        )
    return Counts(asked, correct, float(np.bincount(np.concatenate(answers)).max() / asked.sum()))


def measure(
    answerer: RunAnswerer, segments: int, rows: int, name: str = "", batch_rows: int = 64, source: Source | None = None
) -> Result:
    """`count_answers` with all that a comparison has to state; arguments as there, `name` is for tables."""
    run = answerer.run
    return Result(
        name=name or run.config.name,
        preset=run.config.name,
        workdir=answerer.workdir,
        step=int(run.step),
        params=sum(leaf.size for leaf in jax.tree.leaves(run.params)),
        state_floats=state_floats(jax.eval_shape(lambda: run.model.init_state(1))),
        trained_segments=max(run.config.data.segments),
        segments=segments,
        counts=count_answers(answerer, segments, rows, batch_rows, source),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(Suite):
    """Accuracy by distance in segments, for one run or several. Writes recall.json, .md and .png."""

    kind: ClassVar[str] = "recall"

    workdirs: tuple[str, ...]
    """Workdirs of the runs to compare."""
    segments: tuple[int, ...] = (4, 16)
    """Lengths of the rows, in segments."""
    rows: int = 512
    """Rows of each length."""
    batch_rows: int = 64
    """Maximum number of rows that are read at the same time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.workdirs:
            raise ValueError("workdirs is empty")
        if self.rows < 1 or min(self.segments, default=0) < 1:
            raise ValueError(f"rows and segments must be at least 1, got {self.rows} and {self.segments}")

    def evaluated(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.workdirs))

    def plan(self, answerers: Sequence[RunAnswerer]) -> Evaluation:
        return functools.partial(self._evaluate, answerers, [open_source(answerer) for answerer in answerers])

    def _evaluate(
        self, answerers: Sequence[RunAnswerer], sources: Sequence[Source], output: Output
    ) -> Mapping[str, bytes]:
        names = distinct_names([answerer.run.config for answerer in answerers], self.evaluated())
        results = []
        for segments in dict.fromkeys(self.segments):
            here = [
                measure(answerer, segments, self.rows, name, self.batch_rows, source)
                for answerer, name, source in zip(answerers, names, sources, strict=True)
            ]
            output.show(f"\nAccuracy by distance in segments, rows of {segments} segments (per cent)")
            cells = {(result.name, column): value for result in here for column, value in _columns(result)}
            output.show(report.console_table(cells, "model", means=False))
            results += here
        return result_files(results)


def result_files(results: Sequence[Result]) -> dict[str, bytes]:
    """recall.json, recall.md and recall.png."""
    parts = []
    for segments in dict.fromkeys(result.segments for result in results):
        here = [result for result in results if result.segments == segments]
        parts.append(f"Rows of {segments} segments:\n\n{_markdown(here)}")
    text = "# Recall: accuracy in per cent by distance in segments\n\n" + "\n".join(parts)
    return {
        "recall.json": report.to_json({"suite": "recall", "results": [_plain(result) for result in results]}),
        "recall.md": f"{text}\n{_explained(results)}\n".encode(),
        "recall.png": _picture(results),
    }


def _columns(result: Result) -> list[tuple[str, float]]:
    """Per cent over all, and by groups of distances."""
    columns = [("all", result.counts.accuracy())]
    for first, last in COLUMNS:
        columns.append((f"{first}" if first == last else f"{first}-{last}", result.counts.accuracy(first, last)))
    return [(name, 100 * value) for name, value in columns if value is not None]


def _markdown(results: Sequence[Result]) -> str:
    names = [name for name, _ in _columns(results[0])]
    lines = [
        "| model | parameters | floats of state | questions | " + " | ".join(names) + " |",
        "|---" * (len(names) + 4) + "|",
    ]
    for result in results:
        values = dict(_columns(result))
        shown = " | ".join(f"{values[name]:.1f}" if name in values else "-" for name in names)
        counts = f"{result.params:,} | {result.state_floats:,} | {result.counts.asked.sum():,}"
        lines.append(f"| {result.name} | {counts} | {shown} |")
    return "\n".join(lines) + "\n"


def _explained(results: Sequence[Result]) -> str:
    """What the numbers mean, and what a model without any skill would reach."""
    chance = max(result.counts.most_frequent for result in results)
    runs = {result.workdir: f"{result.name}: {result.preset}, step {result.step}" for result in results}
    return (
        "Distance: segments between a question and the last statement of its fact; 0 is the same segment. "
        f"The most frequent answer is correct for {100 * chance:.1f}% of the questions. {'; '.join(runs.values())}."
    )


def _plain(result: Result) -> dict[str, Any]:
    asked, correct = result.counts.asked.tolist(), result.counts.correct.tolist()
    return {
        "preset": result.preset,
        "model": result.name,
        "workdir": result.workdir,
        "step": result.step,
        "parameters": result.params,
        "state_floats": result.state_floats,
        "trained_segments": result.trained_segments,
        "segments": result.segments,
        "accuracy": result.counts.accuracy(),
        "most_frequent_answer": result.counts.most_frequent,
        "asked": asked,
        "right": correct,
        "interval": [list(report.interval(c, a)) if a else None for c, a in zip(correct, asked, strict=True)],
    }


def _picture(results: Sequence[Result]) -> bytes:
    """Accuracy over distance in the longest rows; distances with fewer than 20 questions are left out."""
    longest = max(result.segments for result in results)
    chosen = [result for result in results if result.segments == longest]
    curves = {}
    for result in chosen:
        at = np.flatnonzero(result.counts.asked >= LEAST_ASKED)
        curves[result.name] = report.Curve(at, result.counts.correct[at], result.counts.asked[at])
    trained = max(result.trained_segments for result in chosen)
    marks = report.Marks(
        chance=100 * max(result.counts.most_frequent for result in chosen),
        chance_name="most frequent answer",
        trained=trained - 1 if trained < longest else None,
    )
    asked = sorted({int(result.counts.asked.sum()) for result in chosen})
    number = " to ".join(f"{count:,}" for count in dict.fromkeys((asked[0], asked[-1])))
    names = "; ".join(f"{result.name}: {result.preset}, step {result.step}" for result in chosen)
    return report.accuracy_plot(
        curves,
        marks,
        f"Recall in rows of {longest} segments",
        ("distance: segments since the fact was last stated", "accuracy in per cent"),
        f"{number} answers per model on held-out rows; bands are 95% confidence intervals. {names}",
    )
