"""Training rows about where ten persons are: their moves are scattered over prose, and questions ask for their places.

    Mary moved to the office. Once upon a time ... Where is Mary? <answer>          target: office

The same as task qa1 of `babilong`, with more persons, and with stages of training that differ in the share of prose.
The demonstration (`lm2_jax.demo`) is trained on it.
"""

import dataclasses
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, NamedTuple

from lm2_jax.data.babi import PLACES, Event, Query, write_question
from lm2_jax.data.background import Prose
from lm2_jax.data.base import Example, Source, SourceConfig, Tokenizer
from lm2_jax.data.event_stream import Step
from lm2_jax.data.interleaved import InterleavedRows, Recipe
from lm2_jax.data.philox import Draws
from lm2_jax.data.text_tokens import Encoder, Noise, noise
from lm2_jax.data.worlds import word
from lm2_jax.fields import Range

PERSONS = ("Mary", "John", "Daniel", "Sandra", "Fred", "Bill", "Jeff", "Anna", "Oliver", "Ruth")
_TASK = "qa1"  # whose sentence forms are used
_TRAIN, _HELD_OUT, _CORPUS = range(3)  # streams of draws
_LONGEST_PHASE = 32  # statements during which the other persons do not move
_CORPUS_SENTENCES = 12_000


def question(person: str) -> str:
    """Where a person is, as a question."""
    return write_question(Query("where_person", (person,))).strip()


def statement(person: str, place: str, draws: Draws) -> str:
    """A sentence that says where a person went, its verb drawn."""
    return word(Event("move", (person, place)), 0.0, draws)


def moves(persons: Sequence[str], draws: Draws) -> Iterator[Event]:
    """Moves without end; for a random number of them only some of the persons act."""
    places: dict[str, str] = {}
    while True:
        active = draws.subset(persons, 1 + draws.below(len(persons)))
        for _ in range(int(_LONGEST_PHASE ** draws.uniform())):
            person = draws.choice(active)
            places[person] = draws.choice([place for place in PLACES if place != places.get(person)])
            yield Event("move", (person, places[person]))


class Stage(NamedTuple):
    """A stage of training."""

    asked: int
    least: float
    most: float
    question_rate: float


@dataclasses.dataclass(frozen=True)
class WhereaboutsSource(SourceConfig):
    """Where ten persons are, asked throughout a text that is prose in part."""

    kind: ClassVar[str] = "whereabouts"
    asked: Annotated[tuple[int, ...], Range(1, len(PERSONS))] = (len(PERSONS),)
    """Persons that move and are asked about, in each stage."""
    least_prose: Annotated[tuple[float, ...], Range(0, 0.99)] = (0.2,)
    """Least share of prose in a row, in each stage; each row draws its share."""
    most_prose: Annotated[tuple[float, ...], Range(0, 0.99)] = (0.2,)
    """Largest share of prose in a row, in each stage."""
    question_rate: Annotated[tuple[float, ...], Range(0, 1)] = (1.0,)
    """Questions per sentence, in each stage."""
    stage_steps: tuple[int, ...] = ()
    """Step at which each stage after the first begins."""

    def __post_init__(self) -> None:
        name, count = "data.source", len(self.stage_steps) + 1
        for field in ("asked", "least_prose", "most_prose", "question_rate"):
            if len(getattr(self, field)) != count:
                raise ValueError(
                    f"{name}.{field} needs one number per stage, {count} with stage_steps={self.stage_steps}, got "
                    f"{getattr(self, field)}"
                )
        if list(self.stage_steps) != sorted(set(self.stage_steps)):
            raise ValueError(f"{name}.stage_steps must increase, got {self.stage_steps}")
        if any(least > most for least, most in zip(self.least_prose, self.most_prose, strict=True)):
            raise ValueError(f"{name}.least_prose={self.least_prose} must not exceed most_prose={self.most_prose}")

    @property
    def stages(self) -> list[Stage]:
        """The stages."""
        columns = (self.asked, self.least_prose, self.most_prose, self.question_rate)
        return [Stage(*values) for values in zip(*columns, strict=True)]

    def build(self, tokenizer: Tokenizer, segment_tokens: int, seed: int) -> Source:
        """See the base class; there are no files."""
        encode, prose = Encoder(tokenizer), Prose()

        def sentences(draws: Draws, held_out: bool) -> Iterator[tuple[str, list[int]]]:
            return noise(prose, encode, draws, held_out, (1, None))

        stages = [_rows(stage, encode, sentences) for stage in self.stages]
        return _StagedRows(stages, self.stage_steps, segment_tokens, seed)

    def corpus(self, seed: int) -> list[str]:
        """Statements, questions and prose in equal parts."""
        draws = Draws(seed, _CORPUS)
        prose, events = Prose().sentences(draws, held_out=False), moves(PERSONS, draws)
        texts = []
        for _ in range(_CORPUS_SENTENCES):
            person, place = next(events).words
            texts += [f" {statement(person, place, draws)}", f" {question(person)} {place}", f" {next(prose)}"]
        return texts


def _rows(stage: Stage, encode: Encoder, sentences: Noise) -> InterleavedRows:
    """The writer of one stage's rows."""
    persons = PERSONS[: stage.asked]
    recipe = Recipe((_TASK,), (1.0,), (stage.least, stage.most), stage.question_rate, closing=False)

    def steps(draws: Draws, held_out: bool) -> Iterator[Step]:
        del held_out  # the draws differ
        for event in moves(persons, draws):
            yield Step(word(event, 0.0, draws), event)

    return InterleavedRows(recipe, encode, steps, sentences)


class _StagedRows:
    """Rows by index; held-out rows are those of the last stage."""

    def __init__(self, stages: Sequence[InterleavedRows], starts: Sequence[int], segment_tokens: int, seed: int):
        self._stages, self._starts, self._segment_tokens, self._seed = stages, starts, segment_tokens, seed

    def example(self, step: int, row: int, rows: int, segments: int, held_out: bool = False) -> Example:
        """See `Source`."""
        draws = Draws(self._seed, _HELD_OUT if held_out else _TRAIN, step * rows + row)
        stage = self._stages[-1 if held_out else bisect_right(self._starts, step)]
        return stage.example(draws, segments, self._segment_tokens, held_out)
