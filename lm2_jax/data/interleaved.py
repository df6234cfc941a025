"""Rows with questions throughout the text, whose answers are only in the targets.

    Mary moved to the office. Once upon a time ... Where is Mary? <answer> John went to the garden. ...
                                                                  target: office

The answer is never part of the text, so no later question can read it: it must come from the statement, at whatever
distance in segments. If answers have several tokens (`Recipe.split_answers`), the tokens with which an answer begins as
another one does are in the text, so that the first token that differs can be asked for:

    ... Where is Mary? <answer> b           with the tokens b/ath/room and b/ed/room; targets: b, ath
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lm2_jax.data.babi import PERSONS, PERSONS_OF, QUESTION_KINDS, Query, all_queries, answers_of, write_question
from lm2_jax.data.base import Example
from lm2_jax.data.event_stream import Step, Steps
from lm2_jax.data.philox import Draws
from lm2_jax.data.story_tracker import StoryTracker
from lm2_jax.data.text_tokens import Encoder, Noise
from lm2_jax.errors import UserError

_FIRST_TASKS = 8  # drawn for a task that can be asked about now, before the question is left out
_NOISE_SWING = 60.0  # tokens by which the share of noise may be off before it is corrected with certainty


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What an interleaved row is made of."""

    tasks: tuple[str, ...]
    weights: tuple[float, ...]
    noise_shares: tuple[float, float]  # least and most background in the tokens of background and statements
    question_rate: float  # questions per sentence
    closing: bool  # whether the row ends with a question, its answer and the end token in the text
    silent: frozenset[str] = frozenset()  # persons that no question is about
    split_answers: bool = False  # whether answers may have several tokens

    def asks(self, query: Query) -> bool:
        """Whether a question may be asked."""
        return self.silent.isdisjoint(query.words)


class _Answer(NamedTuple):
    """An answer in tokens."""

    tokens: list[int]
    asked: list[int]  # the first of them, up to the one that no other answer has there


class _Row:
    """A row while it is written."""

    def __init__(
        self, recipe: Recipe, encode: Encoder, answers: Mapping[str, "_Answer"], segment_tokens: int, draws: Draws
    ):
        self.recipe, self.encode, self.answers, self.draws = recipe, encode, answers, draws
        least, most = recipe.noise_shares
        self.noise_share = least if least == most else least + (most - least) * draws.uniform()
        self.segment_tokens = segment_tokens
        self.tokens: list[int] = []
        self.labels: list[
            tuple[int, int, int]
        ] = []  # position of a marker or answer token, next answer token, distance
        self.tracker = StoryTracker()
        self.last: Query | None = None
        self.stated = self.background = 0  # tokens of statements and of background

    def add_statement(self, step: Step) -> None:
        """Writes a statement; its position is that of its last token."""
        assert step.event is not None
        ids = self.encode(step.text)
        self.tokens += ids
        self.stated += len(ids)
        self.tracker.add(step.event, len(self.tokens) - 1)

    def wants_noise(self) -> bool:
        """Keeps the share of background near its target, in random order."""
        fraction = self.noise_share
        if fraction == 0.0:
            return False
        missing = fraction * (self.stated + self.background) - self.background
        return self.draws.chance(fraction + missing / _NOISE_SWING)

    def pick(self) -> Query | None:
        """A question with an answer: first its distance class (0, 1, 2-3, 4-7, ... segments), then one of the class.

        Far classes are preferred where they exist, because near the beginning of a row they cannot.
        """
        recipe, draws = self.recipe, self.draws
        here = len(self.tokens) // self.segment_tokens
        for _ in range(_FIRST_TASKS):
            task = recipe.tasks[0] if len(recipe.tasks) == 1 else draws.weighted(recipe.tasks, recipe.weights)
            classes: dict[int, list[Query]] = {}
            for kind in QUESTION_KINDS[task]:
                for words, known in self.tracker.known[kind].items():
                    query, distance = Query(kind, words), here - known.latest // self.segment_tokens
                    if recipe.asks(query):
                        classes.setdefault(distance.bit_length(), []).append(query)
            if classes:
                there = sorted(classes)
                return draws.choice(classes[draws.weighted(there, [1 + number for number in there])])
        return None

    def question(self, query: Query) -> list[int]:
        """The tokens that a question adds to the text: with its marker, and what its answer shares with others."""
        known = self.tracker.answer(query)
        assert known is not None
        return self.encode.question(write_question(query)) + self.answers[known.answer].asked[:-1]

    def add_question(self, query: Query) -> list[int]:
        """Writes a question and its marker, and records the answer; returns the answer's tokens not yet in the text."""
        known = self.tracker.answer(query)
        assert known is not None
        answer = self.answers[known.answer]
        at = len(self.tokens) + len(self.encode.question(write_question(query))) - 1
        self.tokens += self.question(query)
        distance = at // self.segment_tokens - known.latest // self.segment_tokens
        self.labels += [(at + number, token, distance) for number, token in enumerate(answer.asked)]
        self.last = query
        return answer.tokens[len(answer.asked) - 1 :]


def _fill(row: _Row, steps: Iterator[Step], noise: Iterator[tuple[str, list[int]]], size: int) -> list[int]:
    """Writes sentences and questions up to `size` tokens; returns the sentence that no longer fits."""
    recipe, encode, draws = row.recipe, row.encode, row.draws
    while True:
        if row.wants_noise():
            ids = next(noise)[1]
            if len(row.tokens) + len(ids) > size:
                return ids
            row.tokens += ids
            row.background += len(ids)
        else:
            step = next(steps)
            ids = encode(step.text)
            if step.query is not None:
                if row.tracker.answer(step.query) is None or not recipe.asks(step.query):
                    continue
                ids = row.question(step.query)
            if len(row.tokens) + len(ids) > size:
                return ids
            if step.query is not None:
                row.add_question(step.query)
                continue
            row.add_statement(step)
        if draws.chance(recipe.question_rate):
            query = row.pick()
            if query is None or (query == row.last and draws.chance(0.5)):
                continue
            ids = row.question(query)
            if len(row.tokens) + len(ids) > size:
                return ids
            row.add_question(query)


class InterleavedRows:
    """Writes rows with questions throughout the text.

    Args:
      recipe: what a row is made of.
      encode: the encoder.
      steps: statements, and questions among them.
      noise: background sentences with their tokens.
    Raises:
      UserError: if an answer is not one token, or with `split_answers` begins with all tokens of another.
    """

    def __init__(self, recipe: Recipe, encode: Encoder, steps: Steps, noise: Noise):
        self._recipe, self._encode, self._steps, self._noise = recipe, encode, steps, noise
        if not recipe.split_answers:
            for task in recipe.tasks:
                _require_single_tokens(task, encode)
        answers = {answer for task in recipe.tasks for answer in answers_of(task)}
        # Of several tasks, one that asks for persons may be answered by one of another task.
        answers |= {person for task in recipe.tasks for person in PERSONS_OF[task] if not answers.isdisjoint(PERSONS)}
        known = sorted(answers)
        self._answers = {answer: _answer(answer, known, encode, recipe.split_answers) for answer in known}
        queries = [query for task in recipe.tasks for query in all_queries(task)]
        # Room for the longest closing question, its answer and the end token.
        self._closing_room = (
            1
            + max(len(answer.tokens) for answer in self._answers.values())
            + max(len(encode.question(write_question(query))) for query in queries)
        )

    def example(self, draws: Draws, segments: int, segment_tokens: int, held_out: bool) -> Example:
        """One row of `segments` segments."""
        size = segments * segment_tokens + 1  # the last token is a target only
        row = _Row(self._recipe, self._encode, self._answers, segment_tokens, draws)
        noise = self._noise(draws, held_out)
        steps = self._steps(draws, held_out)
        body = size - self._closing_room if self._recipe.closing else size
        rest = _fill(row, steps, noise, body)
        query = row.pick() if self._recipe.closing else None
        if query is None:
            row.tokens += rest[: size - len(row.tokens)]
            end = range(0)
        else:
            end = self._close(row, query, noise, size)
        return _example(row, end, segments, segment_tokens, self._encode.pad_id)

    def _close(self, row: _Row, query: Query, noise: Iterator[tuple[str, list[int]]], size: int) -> range:
        """Ends the row with a question, its answer and the end token.

        Returns:
          The positions of the answer's tokens from the last one that a label asks for.
        """
        known = row.tracker.answer(query)
        assert known is not None
        body = size - 1 - len(self._answers[known.answer].tokens) - len(self._encode.question(write_question(query)))
        # The gap is filled with background, cut to fit as BABILong does; without background the row ends early.
        while row.noise_share > 0.0 and len(row.tokens) < body:
            row.tokens += next(noise)[1][: body - len(row.tokens)]
        rest = row.add_question(query)
        row.tokens += [*rest, self._encode.eos_id]
        return range(len(row.tokens) - 1 - len(rest), len(row.tokens) - 1)


def _example(row: _Row, end: range, segments: int, segment_tokens: int, pad_id: int) -> Example:
    """The row as an example; `end` is where an answer is part of the text, followed by the end token."""
    example = Example.next_token(row.tokens, segments, segment_tokens, pad_id)
    for at, token, segments_back in row.labels:
        if at < len(example.tokens):
            example.mark_answer(at)
            example.targets[at], example.distance[at] = token, segments_back
    for at in end:
        example.mark_answer(at)
    return example


def _require_single_tokens(task: str, encode: Encoder) -> None:
    for answer in answers_of(task):
        tokens = len(encode(answer))
        if tokens != 1:
            raise UserError(
                f"data.source.layout 'interleaved' needs answers of one token each, but {answer!r} (task {task}) has "
                f"{tokens} under this tokenizer; use a larger vocabulary, another tokenizer, layout 'question_last' or "
                "data.source.split_answers"
            )


def _answer(answer: str, answers: Sequence[str], encode: Encoder, split: bool) -> _Answer:
    """An answer among others; without `split` its first token."""
    ids = encode(answer)
    if not split:
        return _Answer(ids[:1], ids[:1])
    for count in range(1, len(ids) + 1):
        if all(encode(other)[:count] != ids[:count] for other in answers if other != answer):
            return _Answer(ids, ids[:count])
    raise UserError(
        "data.source.layout 'interleaved' needs answers that differ in a token, but another answer begins with all "
        f"tokens of {answer!r} under this tokenizer; use another tokenizer or layout 'question_last'"
    )
