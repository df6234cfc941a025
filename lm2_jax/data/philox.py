"""Random draws that are functions of a key: cheap single numbers from numpy's Philox."""

import bisect
import itertools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_BLOCK = 256


class Draws:
    """An endless stream of draws, fixed by its key; the same on every machine and in every process.

    Philox gives uniform numbers in blocks, so that one draw costs a list access and no call into numpy.

    Args:
      key: integers, such as (seed, stream, index).
    """

    def __init__(self, *key: int):
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([k % 2**64 for k in key])))
        self._block: list[float] = []

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._block:
            self._block = self._generator.random(_BLOCK).tolist()
        return self._block.pop()

    def below(self, bound: int) -> int:
        """An integer in [0, bound)."""
        return int(self.uniform() * bound)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform() < probability

    def choice(self, items: Sequence[T]) -> T:
        """One of the items, all equally likely."""
        return items[int(self.uniform() * len(items))]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        """One of the items, with chances in proportion to the weights."""
        total = list(itertools.accumulate(weights))
        return items[min(bisect.bisect_right(total, self.uniform() * total[-1]), len(items) - 1)]

    def subset(self, items: Sequence[T], size: int) -> list[T]:
        """`size` different items, in random order."""
        pool = list(items)
        for i in range(size):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:size]
