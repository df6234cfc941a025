"""What a source of training examples is, and the arrays it gives."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from lm2_jax.registry import Family


@runtime_checkable  # so that the annotations can be checked in tests
class Tokenizer(Protocol):
    """Text to tokens and back."""

    vocab_size: int
    pad_id: int
    eos_id: int
    answer_id: int | None  # the marker after a question, where the vocabulary has one

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added before or after."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens left out."""
        ...


class Example(NamedTuple):
    """One row of S = K*T positions, or a batch with rows as the first axis. Position i predicts `targets[i]`."""

    tokens: np.ndarray  # [S] int32
    targets: np.ndarray  # [S] int32: the token to predict here
    answer: np.ndarray  # [S] bool: the target belongs to an answer
    text: np.ndarray  # [S] bool: the target is text that can be learned from
    valid: np.ndarray  # [S] bool: False is padding
    reset: np.ndarray  # [K] bool: a document begins at this segment
    distance: np.ndarray  # [S] int32: at the first token of an answer, segments back to the latest mention; else -1
    document: np.ndarray  # [S] int32: number of the document within its segment; all 0 unless packed

    @classmethod
    def padding(cls, segments: int, segment_tokens: int, pad_id: int) -> "Example":
        """A row without any text, whose arrays a source then fills."""
        size = segments * segment_tokens
        return cls(
            tokens=np.full(size, pad_id, np.int32),
            targets=np.full(size, pad_id, np.int32),
            answer=np.zeros(size, bool),
            text=np.zeros(size, bool),
            valid=np.zeros(size, bool),
            reset=np.zeros(segments, bool),
            distance=np.full(size, -1, np.int32),
            document=np.zeros(size, np.int32),
        )

    @classmethod
    def next_token(cls, stream: Sequence[int], segments: int, segment_tokens: int, pad_id: int) -> "Example":
        """One document of at most S + 1 tokens, from the start of a row: position i predicts token i + 1.

        Args:
          stream: the tokens; the last one is a target only.
          segments: segments K of the row.
          segment_tokens: tokens T of a segment.
          pad_id: fills the rest of the row.
        """
        row = cls.padding(segments, segment_tokens, pad_id)
        count = len(stream) - 1
        row.tokens[: len(stream)] = stream[: len(row.tokens)]
        row.targets[:count] = stream[1:]
        row.valid[:count] = row.text[:count] = True
        row.reset[0] = True
        return row

    def mark_answer(self, start: int, count: int = 1) -> None:
        """Makes the targets at `count` positions from `start` on an answer, which is no text to learn from."""
        self.answer[start : start + count] = self.valid[start : start + count] = True
        self.text[start : start + count] = False


@dataclasses.dataclass(frozen=True)
class SourceConfig(Family):
    """Base of all sources; `data.source` of a run."""

    @property
    def continues(self) -> bool:
        """Whether row r of a step continues the text of row r of the step before; `data.carry_state` needs that.

        Such a source needs the same number of segments at every step.
        """
        return False

    @property
    def packs(self) -> bool:
        """Whether a segment can hold several documents, which `Example.document` numbers."""
        return False

    @property
    def suites(self) -> tuple[str, ...]:
        """Suites of evaluation that fit what a run learns here, the closest first."""
        return ("perplexity",)

    def build(self, tokenizer: Tokenizer, segment_tokens: int, seed: int) -> "Source":
        """Opens the source; a missing folder or file is a `UserError`."""
        raise NotImplementedError

    def corpus(self, seed: int) -> list[str]:
        """Text to train a tokenizer on, a few megabytes at most; the same for the same seed."""
        raise NotImplementedError


@runtime_checkable
class Source(Protocol):
    """Random access to examples: each row of each step is a function of its step and its number."""

    def example(self, step: int, row: int, rows: int, segments: int, held_out: bool = False) -> Example:
        """The example of one row of a global batch of `rows` rows of `segments` segments each.

        Args:
          step: optimizer step, from 0.
          row: row of the global batch, from 0.
          rows: rows of the global batch.
          segments: segments K of the row.
          held_out: examples that training never sees.
        Returns:
          The same arrays for the same arguments, on any host and in any order.
        """
        ...
