"""BABILong for training: bAbI facts among background text, with one question at the end or questions throughout."""

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, ClassVar, Literal

from lm2_jax.data.babi import PERSONS_OF, TASKS, WORLD_TASKS, Sample, answers_of, read_samples, read_stories
from lm2_jax.data.background import open_background
from lm2_jax.data.base import Example, Source, SourceConfig, Tokenizer
from lm2_jax.data.event_stream import Steps, chained, simulated
from lm2_jax.data.interleaved import InterleavedRows, Recipe
from lm2_jax.data.philox import Draws
from lm2_jax.data.protocol import MIN_SENTENCE_TOKENS, limit_facts
from lm2_jax.data.question_last import QuestionLastRows, SampleSampler
from lm2_jax.data.text_tokens import Encoder, Noise, noise
from lm2_jax.data.worlds import simulate_sample
from lm2_jax.fields import Since

_TRAIN, _HELD_OUT, _CORPUS = range(3)  # streams of draws
_CORPUS_CHARACTERS = 600_000  # of facts, questions and answers
_CORPUS_FACTS = 12  # of one story at most
_REPEATS = 2000  # of an answer that no story has


@dataclasses.dataclass(frozen=True)
class BabilongSource(SourceConfig):
    """Questions about facts that are scattered over a long text (BABILong, arXiv:2406.10149)."""

    kind: ClassVar[str] = "babilong"
    tasks: tuple[str, ...] = ("qa1",)
    """Tasks; interleaved questions and simulated worlds support qa1 to qa5, real files all 20."""
    task_weights: tuple[float, ...] = ()
    """How often each task is drawn, relative; empty: equally often."""
    layout: Literal["question_last", "interleaved"] = "interleaved"
    """One question at the end of a row (the published form), or questions throughout it."""
    babi_dir: str | None = None
    """Folder of real bAbI files, such as en-10k (held-out rows read the test files); None: simulated worlds."""
    books_dir: str | None = None
    """Folder of .txt books for the background; None: generated prose."""
    min_sentence_tokens: int = MIN_SENTENCE_TOKENS
    """Background sentences with fewer tokens are left out."""
    max_sentence_tokens: int | None = None
    """Background sentences with more tokens are left out; None: none are."""
    noise_fraction: float = 0.5
    """Interleaved: share of background in the tokens of statements and background."""
    noise_up_to: float | None = None
    """Interleaved: each row draws its share between `noise_fraction` and this, evenly; None: every row has
    `noise_fraction`."""
    question_rate: float = 0.5
    """Interleaved: questions per sentence."""
    asked: tuple[int, ...] = ()
    """Interleaved: number of persons that questions are about, in each stage; empty: all persons in every stage. With
    several persons a memory has to learn where to write and where to read at once; with one person it need not."""
    asked_steps: tuple[int, ...] = ()
    """Interleaved: step at which each stage of `asked` after the first begins."""
    closing: bool = True
    """Interleaved: whether the row ends with a question, its answer and the end token in the text."""
    split_answers: Annotated[bool, Since(4)] = False
    """Interleaved: whether answers may have several tokens. The tokens with which an answer begins as another one does
    are part of the text, and the first one that differs is asked for; only the closing question has the full answer."""
    max_facts: int | None = None
    """Question last: samples with more facts are dropped (and counted in the log), where the question counts as a fact,
    as in the published filter; None: none are dropped."""
    margin: int = 0
    """Question last: tokens at the end of the row that stay padding (the published runs leave 20)."""
    plain_fraction: float = 0.0
    """Question last: share of rows without background, the rest of the row padding."""

    def __post_init__(self) -> None:
        name = "data.source"
        if not self.tasks:
            raise ValueError(f"{name}.tasks is empty; expected tasks such as ('qa1',)")
        needs_world = self.layout == "interleaved" or self.babi_dir is None
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"{name}.tasks: unknown task {task!r}; known: qa1 to qa20")
            if needs_world and task not in WORLD_TASKS:
                raise ValueError(
                    f"{name}.tasks: {task!r} needs layout 'question_last' and real files in babi_dir; layout "
                    f"'interleaved' and the simulator support {list(WORLD_TASKS)}"
                )
        if self.task_weights and (len(self.task_weights) != len(self.tasks) or min(self.task_weights) <= 0):
            raise ValueError(
                f"{name}.task_weights needs one positive number per task of {self.tasks}, got {self.task_weights}"
            )
        if not 0.0 <= self.noise_fraction < 1.0:
            raise ValueError(f"{name}.noise_fraction must be at least 0 and below 1, got {self.noise_fraction}")
        if self.noise_up_to is not None and not self.noise_fraction <= self.noise_up_to < 1.0:
            raise ValueError(
                f"{name}.noise_up_to must be at least noise_fraction={self.noise_fraction} and below 1, got "
                f"{self.noise_up_to}"
            )
        if not 0.0 < self.question_rate <= 1.0:
            raise ValueError(f"{name}.question_rate must be above 0 and at most 1, got {self.question_rate}")
        starts = list(self.asked_steps)
        if starts != sorted(set(starts)) or len(starts) != max(len(self.asked) - 1, 0) or 0 in self.asked:
            raise ValueError(
                f"{name}.asked needs one positive number per stage, and asked_steps one increasing step per stage "
                f"after the first; got {self.asked} and {self.asked_steps}"
            )
        if not 0.0 <= self.plain_fraction <= 1.0:
            raise ValueError(f"{name}.plain_fraction must be between 0 and 1, got {self.plain_fraction}")
        if self.min_sentence_tokens < 1:
            raise ValueError(f"{name}.min_sentence_tokens must be at least 1, got {self.min_sentence_tokens}")
        if self.max_sentence_tokens is not None and self.max_sentence_tokens < self.min_sentence_tokens:
            raise ValueError(
                f"{name}.max_sentence_tokens={self.max_sentence_tokens} is below "
                f"min_sentence_tokens={self.min_sentence_tokens}"
            )
        if self.max_facts is not None and self.max_facts < 3:
            raise ValueError(
                f"{name}.max_facts must be at least 3 (two facts and the question) or None, got {self.max_facts}"
            )
        if self.margin < 0:
            raise ValueError(f"{name}.margin must not be negative, got {self.margin}")

    @property
    def weights(self) -> tuple[float, ...]:
        """One weight per task."""
        return self.task_weights or (1.0,) * len(self.tasks)

    @property
    def _noise_shares(self) -> tuple[float, float]:
        """Least and most background in a row."""
        return self.noise_fraction, self.noise_fraction if self.noise_up_to is None else self.noise_up_to

    @property
    def suites(self) -> tuple[str, ...]:
        """Recall by distance for questions throughout a row, BABILong for one at its end."""
        return ("recall",) if self.layout == "interleaved" else ("babilong",)

    def build(self, tokenizer: Tokenizer, segment_tokens: int, seed: int) -> Source:
        """Opens the files; arguments and errors as in the base class."""
        encode = Encoder(tokenizer)
        background = open_background(self.books_dir)
        bounds = (self.min_sentence_tokens, self.max_sentence_tokens)

        def sentences(draws: Draws, held_out: bool) -> Iterator[tuple[str, list[int]]]:
            return noise(background, encode, draws, held_out, bounds)

        # Stages are a property of interleaved rows only.
        layouts = {"interleaved": (self._interleaved, self.asked_steps), "question_last": (self._question_last, ())}
        stages, starts = layouts[self.layout]
        return _RowSource([rows.example for rows in stages(encode, sentences)], starts, segment_tokens, seed)

    def _interleaved(self, encode: Encoder, sentences: Noise) -> list[InterleavedRows]:
        persons = sorted({person for task in self.tasks for person in PERSONS_OF[task]})
        recipe = Recipe(
            self.tasks,
            self.weights,
            self._noise_shares,
            self.question_rate,
            self.closing,
            split_answers=self.split_answers,
        )
        steps = self._steps()
        stages = [
            dataclasses.replace(recipe, silent=frozenset(persons[count:])) for count in self.asked or (len(persons),)
        ]
        return [InterleavedRows(stage, encode, steps, sentences) for stage in stages]

    def _question_last(self, encode: Encoder, sentences: Noise) -> list[QuestionLastRows]:
        sampler = SampleSampler(self.tasks, self.weights, self._samples(), self.max_facts)
        return [QuestionLastRows(sampler, encode, sentences, self.margin, self.plain_fraction)]

    def _steps(self) -> Steps:
        if self.babi_dir is None:
            return simulated(self.tasks)
        train, test = (
            {task: read_stories(self.babi_dir, task, split) for task in self.tasks} for split in ("train", "test")
        )
        return chained(train, test, self.weights)

    def _samples(self) -> dict[tuple[str, bool], list[Sample]] | None:
        """Real samples by task and whether they are held out; None for the simulator."""
        if self.babi_dir is None:
            return None
        return {
            (task, split == "test"): limit_facts(read_samples(self.babi_dir, task, split), self.max_facts, task)
            for task in self.tasks
            for split in ("train", "test")
        }

    def corpus(self, seed: int) -> list[str]:
        """Stories with a question and its answer, and half as much background, or as much as interleaved rows have."""
        draws = Draws(seed, _CORPUS)
        background = open_background(self.books_dir).sentences(draws, held_out=False)
        share = sum(self._noise_shares) / 2 if self.layout == "interleaved" else 0.5
        samples = self._samples()
        texts: list[str] = []
        written = filled = 0
        while written < _CORPUS_CHARACTERS:
            task = draws.weighted(self.tasks, self.weights)
            sample = simulate_sample(task, draws) if samples is None else draws.choice(samples[task, False])
            facts = " ".join(sample.facts[-_CORPUS_FACTS:])
            texts.append(f" {facts} {sample.question.strip()} {sample.answer}")
            written += len(texts[-1])
            while filled < written * share / (1 - share):
                texts.append(" " + next(background))
                filled += len(texts[-1])
        if self.layout == "interleaved":  # its answers are one token each, those too that small files never give
            words = set(" ".join(texts).replace(".", " ").split())
            texts += [f" {word}" for task in self.tasks for word in answers_of(task) if word not in words] * _REPEATS
        return texts


class _RowSource:
    """Rows by index; each stage has its own writer, and held-out rows use that of the last stage."""

    def __init__(
        self,
        stages: Sequence[Callable[[Draws, int, int, bool], Example]],
        starts: Sequence[int],
        segment_tokens: int,
        seed: int,
    ):
        self._stages, self._starts, self._segment_tokens, self._seed = stages, starts, segment_tokens, seed

    def example(self, step: int, row: int, rows: int, segments: int, held_out: bool = False) -> Example:
        """See `Source`."""
        draws = Draws(self._seed, _HELD_OUT if held_out else _TRAIN, step * rows + row)
        write = self._stages[-1 if held_out else bisect_right(self._starts, step)]
        return write(draws, segments, self._segment_tokens, held_out)
