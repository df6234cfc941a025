"""Rows of one BABILong sample each: context, question, marker, answer and end token; the model learns the last two."""

import logging
from collections.abc import Callable, Mapping, Sequence

from lm2_jax.data.babi import Sample
from lm2_jax.data.base import Example
from lm2_jax.data.philox import Draws
from lm2_jax.data.protocol import babilong_sample, facts_tokens, within_limit
from lm2_jax.data.text_tokens import Encoder, Noise
from lm2_jax.data.worlds import simulate_sample
from lm2_jax.errors import UserError

_TRIES = 500  # simulated samples drawn until one fits

_log = logging.getLogger(__name__)


class SampleSampler:
    """Samples by random draw.

    Args:
      tasks: tasks to draw from.
      weights: of the tasks.
      samples: real samples by (task, held out), or None to simulate.
      max_facts: most facts of a simulated sample (real ones are filtered already).
    """

    def __init__(
        self,
        tasks: Sequence[str],
        weights: Sequence[float],
        samples: Mapping[tuple[str, bool], list[Sample]] | None,
        max_facts: int | None,
    ):
        self._tasks, self._weights, self._samples, self._max_facts = tasks, weights, samples, max_facts
        self._fitting: dict[tuple[str, bool, int], list[Sample]] = {}

    def draw(self, draws: Draws, held_out: bool, size: int, need: Callable[[Sample], int]) -> Sample:
        """A sample whose `need` of tokens is at most `size`.

        Raises:
          UserError: if there is none.
        """
        task = draws.weighted(self._tasks, self._weights)
        if self._samples is not None:
            return draws.choice(self._fit(task, held_out, size, need))
        for _ in range(_TRIES):
            sample = simulate_sample(task, draws)
            if need(sample) <= size and within_limit(sample, self._max_facts):
                return sample
        raise _too_short(task, size)

    def _fit(self, task: str, held_out: bool, size: int, need: Callable[[Sample], int]) -> list[Sample]:
        """The real samples that fit, found once for each size; the rest is counted in the log."""
        assert self._samples is not None
        key = (task, held_out, size)
        if key not in self._fitting:
            every = self._samples[task, held_out]
            kept = [sample for sample in every if need(sample) <= size]
            if not kept:
                raise _too_short(task, size)
            if len(kept) < len(every):
                _log.info(
                    "%s: %d of %d samples are longer than %d tokens", task, len(every) - len(kept), len(every), size
                )
            self._fitting[key] = kept
        return self._fitting[key]


def _too_short(task: str, size: int) -> UserError:
    return UserError(
        f"data.source: no sample of {task} fits in a row of {size} tokens with its question and answer; use more "
        "data.segments, a longer model.segment_tokens, a larger max_facts or a smaller margin"
    )


class QuestionLastRows:
    """Writes rows with one question at the end.

    Args:
      sampler: samples.
      encode: the encoder.
      noise: background sentences with their tokens.
      margin: positions at the end of the row left as padding.
      plain_fraction: share of rows without background.
    """

    def __init__(self, sampler: SampleSampler, encode: Encoder, noise: Noise, margin: int, plain_fraction: float):
        self._sampler, self._encode, self._noise = sampler, encode, noise
        self._margin, self._plain_fraction = margin, plain_fraction

    def _end(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Question with marker, and answer with the end token."""
        return self._encode.question(sample.question), [*self._encode(sample.answer), self._encode.eos_id]

    def _need(self, sample: Sample) -> int:
        question, answer = self._end(sample)
        return facts_tokens(sample, self._encode) + len(question) + len(answer)

    def example(self, draws: Draws, segments: int, segment_tokens: int, held_out: bool) -> Example:
        """One row of `segments` segments."""
        room = segments * segment_tokens + 1 - self._margin  # the end token is a target only
        sample = self._sampler.draw(draws, held_out, room, self._need)
        question, answer = self._end(sample)
        total = 0 if draws.chance(self._plain_fraction) else room - len(question) - len(answer)
        placed = babilong_sample(sample, self._noise(draws, held_out), self._encode, total, draws)
        marker = len(placed.tokens) + len(question) - 1
        stream = placed.tokens + question + answer
        example = Example.next_token(stream, segments, segment_tokens, self._encode.pad_id)
        example.mark_answer(marker, len(answer))
        example.distance[marker] = marker // segment_tokens - placed.latest // segment_tokens
        return example
