"""Several sources in one run, each with a weight."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from lm2_jax.data.base import Example, Source, SourceConfig, Tokenizer
from lm2_jax.data.draws import draw, shuffled
from lm2_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedSource(SourceConfig):
    """Rows from several sources, by weight."""

    kind: ClassVar[str] = "mixed"

    parts: tuple[SourceConfig, ...]
    """The sources."""
    weights: tuple[float, ...]
    """One positive number for each; the share of the rows is the weight over the sum of all."""

    def __post_init__(self) -> None:
        if len(self.parts) < 1 or len(self.weights) != len(self.parts) or min(self.weights) <= 0:
            raise ValueError(
                f"source.weights needs a positive number for each of the {len(self.parts)} parts, got {self.weights}"
            )

    @property
    def continues(self) -> bool:
        """Whether any part's rows continue from step to step; then each row keeps its part."""
        return any(part.continues for part in self.parts)

    @property
    def packs(self) -> bool:
        """Whether any part's segments can hold several documents."""
        return any(part.packs for part in self.parts)

    @property
    def suites(self) -> tuple[str, ...]:
        """Those of all parts."""
        return tuple(dict.fromkeys(suite for part in self.parts for suite in part.suites))

    def build(self, tokenizer: Tokenizer, segment_tokens: int, seed: int) -> Source:
        """Opens all parts, each with its own seed, so that equal parts write different rows."""
        sources = [
            part.build(tokenizer, segment_tokens, draw(seed, "part", index)) for index, part in enumerate(self.parts)
        ]
        mixture = _MixtureByRow if self.continues else _MixtureByExample
        return mixture(sources, self.weights, seed)

    def corpus(self, seed: int) -> list[str]:
        """The parts' corpora in turn; a part that has no text is a `UserError`."""
        return [text for part in self.parts for text in part.corpus(seed)]


class _MixtureByExample:
    """Each row of each step draws its source; a source that reads by step skips the rows of the others."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int):
        self._sources, self._seed = sources, seed
        self._bounds = np.cumsum(weights) / sum(weights)

    def example(self, step: int, row: int, rows: int, segments: int, held_out: bool = False) -> Example:
        point = draw(self._seed, "mix", step, row) / 2**64
        part = min(int(np.searchsorted(self._bounds, point, side="right")), len(self._sources) - 1)
        return self._sources[part].example(step, row, rows, segments, held_out)


class _MixtureByRow:
    """Each source has rows of its own for the entire run, numbered from 0."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int):
        self._sources, self._seed = sources, seed
        self._bounds = np.cumsum(weights) / sum(weights)

    def example(self, step: int, row: int, rows: int, segments: int, held_out: bool = False) -> Example:
        # The shuffled rows are divided in proportion to the weights, each share rounded.
        ends = np.round(self._bounds * rows).astype(int)
        starts = np.concatenate([[0], ends[:-1]])
        if np.any(starts == ends):
            raise UserError(
                f"data.source: {len(self._sources)} sources share data.rows={rows} rows by weight, and one would get "
                "none: raise data.rows or its weight"
            )
        place = int(np.flatnonzero(shuffled(rows, self._seed, "mix") == row)[0])
        part = int(np.searchsorted(ends, place, side="right"))
        own_row, own_rows = place - int(starts[part]), int(ends[part] - starts[part])
        return self._sources[part].example(step, own_row, own_rows, segments, held_out)
