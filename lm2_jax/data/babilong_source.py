"""BABILong for training: bAbI facts among background text, with the question at the end or questions all along."""

import dataclasses
import functools
from typing import ClassVar, Literal

from lm2_jax.data.babi import WORLD_TASKS, all_queries, read_stories, write_question
from lm2_jax.data.background import open_background
from lm2_jax.data.base import Example, Source, SourceConfig, Tokenizer
from lm2_jax.data.philox import Draws
from lm2_jax.data.interleaved import InterleavedRows, Recipe
from lm2_jax.data.text_tokens import Encoder, noise
from lm2_jax.data.wander import Steps, chained, simulated

_TRAIN, _HELD_OUT, _CORPUS = range(3)  # streams of draws
_CORPUS_STORIES = 1500


@dataclasses.dataclass(frozen=True)
class BabilongSource(SourceConfig):
    """Questions about facts that are scattered over a long text (BABILong, arXiv:2406.10149)."""

    kind: ClassVar[str] = "babilong"
    tasks: tuple[str, ...] = ("qa1",)
    """Tasks; interleaved questions and simulated worlds know qa1 to qa5, real files bring all 20."""
    task_weights: tuple[float, ...] = ()
    """How often each task is drawn, relative; empty: equally often."""
    layout: Literal["question_last", "interleaved"] = "interleaved"
    """One question at the end of a row (the published form), or questions all along it."""
    babi_dir: str | None = None
    """Folder of real bAbI files, such as en-10k; None: simulated worlds."""
    books_dir: str | None = None
    """Folder of .txt books for the background; None: generated prose."""
    noise_fraction: float = 0.5
    """Interleaved: share of background among the sentences' tokens."""
    question_rate: float = 0.5
    """Interleaved: questions per sentence."""
    closing: bool = True
    """Interleaved: whether the row ends with a question, its answer and the end token in the text."""
    min_sentence_tokens: int = 10
    """Background sentences with fewer tokens are left out."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("data.source.tasks is empty; expected tasks such as ('qa1',)")
        for task in self.tasks:
            if task not in WORLD_TASKS:
                raise ValueError(f"data.source.tasks: unknown task {task!r}; known: {list(WORLD_TASKS)}")
        if self.task_weights and (len(self.task_weights) != len(self.tasks) or min(self.task_weights) <= 0):
            raise ValueError(
                f"data.source.task_weights needs one positive number per task of {self.tasks}, got {self.task_weights}"
            )
        if not 0.0 <= self.noise_fraction < 1.0:
            raise ValueError(f"data.source.noise_fraction must be at least 0 and below 1, got {self.noise_fraction}")
        if not 0.0 < self.question_rate <= 1.0:
            raise ValueError(f"data.source.question_rate must be above 0 and at most 1, got {self.question_rate}")

    @property
    def weights(self) -> tuple[float, ...]:
        """One weight per task."""
        return self.task_weights or (1.0,) * len(self.tasks)

    def build(self, tokenizer: Tokenizer, segment_tokens: int, seed: int) -> Source:
        """Opens the files; arguments and errors as in the base class."""
        encode = Encoder(tokenizer)
        background = open_background(self.books_dir)
        recipe = Recipe(self.tasks, self.weights, self.noise_fraction, self.question_rate, self.closing)

        def sentences(draws: Draws, held_out: bool):
            return noise(background, encode, draws, held_out, self.min_sentence_tokens)

        return _InterleavedSource(InterleavedRows(recipe, encode, self._steps(), sentences), segment_tokens, seed)

    def _steps(self) -> Steps:
        if self.babi_dir is None:
            return simulated(self.tasks)
        train, test = (
            {task: read_stories(self.babi_dir, task, split) for task in self.tasks} for split in ("train", "test")
        )
        return chained(train, test, self.weights)

    def corpus(self, seed: int) -> list[str]:
        """Facts with all questions and answers, and background in the share of `noise_fraction`."""
        draws = Draws(seed, _CORPUS)
        background = open_background(self.books_dir).sentences(draws, held_out=False)
        steps = self._steps()(draws, False)
        texts, told, filled = [], 0, 0
        questions = [write_question(query).strip() for task in self.tasks for query in all_queries(task)]
        for _ in range(_CORPUS_STORIES):
            facts = " ".join(next(steps).text.strip() for _ in range(10))
            texts.append(f" {facts} {' '.join(draws.choice(questions) for _ in range(5))}")
            told += len(texts[-1])
            while filled < told * self.noise_fraction / (1 - self.noise_fraction):
                texts.append(" " + next(background))
                filled += len(texts[-1])
        return texts


class _InterleavedSource:
    """Rows of `InterleavedRows`, by index."""

    def __init__(self, rows: InterleavedRows, segment_tokens: int, seed: int):
        self._rows, self._segment_tokens, self._seed = rows, segment_tokens, seed

    def example(self, step: int, row: int, rows: int, segments: int, held_out: bool = False) -> Example:
        """See `Source`."""
        draws = Draws(self._seed, _HELD_OUT if held_out else _TRAIN, step * rows + row)
        return self._rows.example(draws, segments, self._segment_tokens, held_out)
