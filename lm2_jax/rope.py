"""Rotary frequencies, and the ways in which checkpoints stretch them to texts longer than those of their training."""

import dataclasses
import math
from typing import Annotated, ClassVar

import numpy as np

from lm2_jax.fields import Range
from lm2_jax.registry import Family

Factor = Annotated[float, Range(1, 1e4)]
Tokens = Annotated[int, Range(1, 10**9)]


@dataclasses.dataclass(frozen=True)
class RopeScaling(Family):
    """Base of the changes to the rotary frequencies; `model.decoder.rope_scaling` of a run."""

    first_kind: ClassVar[str | None] = "llama3"

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        """The changed frequencies.

        Args:
          plain: theta^(-2i/K) for each of the K/2 pairs, float64.
          theta: their base.
        """
        raise NotImplementedError

    @property
    def score_factor(self) -> float:
        """What the products of rotated queries and keys are multiplied by, in addition to 1 / sqrt(K)."""
        return 1.0

    @property
    def max_tokens(self) -> int | None:
        """Longest text with these frequencies, where they depend on the length of a text; None: any."""
        return None


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3's scaling of the low RoPE frequencies.

    f is divided by `factor` below a first frequency and kept above a second one; between the two it is interpolated
    linearly in original_tokens * f / (2 pi).
    """

    kind: ClassVar[str] = "llama3"
    factor: Factor = 8.0
    """Factor by which the longest wavelengths grow."""
    low_frequency_factor: Annotated[float, Range(0, 1e4, above=True)] = 1.0
    """Wavelengths above original_tokens / this are scaled by the full factor."""
    high_frequency_factor: Annotated[float, Range(0, 1e4, above=True)] = 4.0
    """Wavelengths below original_tokens / this are not scaled."""
    original_tokens: Tokens = 8192
    """Context length that the unscaled frequencies were made for."""

    def __post_init__(self) -> None:
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"model.decoder.rope_scaling.low_frequency_factor={self.low_frequency_factor} must be below "
                f"high_frequency_factor={self.high_frequency_factor}"
            )

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        """See the base class."""
        turns = self.original_tokens * plain / (2 * np.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return keep * plain + (1 - keep) * plain / self.factor


@dataclasses.dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """All frequencies divided by one factor (position interpolation, arXiv:2306.15595)."""

    kind: ClassVar[str] = "linear"
    factor: Factor = 2.0
    """Factor by which all wavelengths grow."""

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        """See the base class."""
        return plain / self.factor


@dataclasses.dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """Dynamic NTK, as far as it does not depend on the length of the text: the plain frequencies.

    Beyond original_tokens the base grows with the text, so the keys of earlier tokens would have to be rotated again
    with every token. Keys that are kept from segment to segment have one rotation, so longer texts are refused.
    """

    kind: ClassVar[str] = "dynamic"
    factor: Factor = 2.0
    """Growth of the base in texts longer than original_tokens; kept for export, changes nothing here."""
    original_tokens: Tokens = 2048
    """Context length of the training, and the longest attention that is supported."""

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        """See the base class."""
        return plain

    @property
    def max_tokens(self) -> int | None:
        """See the base class."""
        return self.original_tokens


@dataclasses.dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (arXiv:2309.00071): high frequencies kept, low ones divided by `factor`, scores multiplied.

        f'_i = r_i f_i / factor + (1 - r_i) f_i,    r_i = clip((i - low) / (high - low), 0, 1)

    The pair at which a frequency makes n turns in the original context is K ln(original_tokens / (2 pi n)) / (2 ln
    theta); `low` is that of `beta_fast` turns, `high` that of `beta_slow`. Queries and keys are both multiplied by
    `attention_factor`.
    """

    kind: ClassVar[str] = "yarn"
    factor: Factor = 4.0
    """Factor by which the longest wavelengths grow."""
    original_tokens: Tokens = 4096
    """Context length that the unscaled frequencies were made for."""
    beta_fast: Annotated[float, Range(0, 1e4, above=True)] = 32.0
    """Frequencies of more turns in original_tokens than this are kept."""
    beta_slow: Annotated[float, Range(0, 1e4, above=True)] = 1.0
    """Frequencies of fewer turns in original_tokens than this are divided by the full factor."""
    truncate: bool = True
    """Whether the two limits are rounded outwards to pairs."""
    attention_factor: Annotated[float | None, Range(0, 1e3, above=True)] = None
    """Factor of queries and of keys; None: 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"model.decoder.rope_scaling.beta_fast={self.beta_fast} must not be below beta_slow={self.beta_slow}"
            )

    def frequencies(self, plain: np.ndarray, theta: float) -> np.ndarray:
        """See the base class."""
        low, high = self._pair(self.beta_fast, len(plain), theta), self._pair(self.beta_slow, len(plain), theta)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * len(plain) - 1)
        width = high - low if high != low else 0.001  # a step where both limits are one pair
        divided = np.clip((np.arange(len(plain)) - low) / width, 0.0, 1.0)
        return divided * plain / self.factor + (1 - divided) * plain

    def _pair(self, turns: float, pairs: int, theta: float) -> float:
        """The pair, as a real number, whose frequency makes so many turns in the original context."""
        return pairs * math.log(self.original_tokens / (2 * math.pi * turns)) / math.log(theta)

    @property
    def score_factor(self) -> float:
        """See the base class."""
        return (yarn_factor(self.factor) if self.attention_factor is None else self.attention_factor) ** 2


def yarn_factor(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor of queries and keys for a growth of the context, 0.1 * weight * ln(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Rotary frequencies in radians per position, one for each of the K/2 pairs, float64: theta^(-2i/K), scaled."""
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return plain if scaling is None else scaling.frequencies(plain, theta)
