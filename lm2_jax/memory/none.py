"""No memory: the baseline of every comparison."""

import dataclasses
from typing import ClassVar

from lm2_jax.memory.base import Capability, MemoryConfig


@dataclasses.dataclass(frozen=True)
class NoMemory(MemoryConfig):
    """Nothing crosses a segment border but, if configured, the attention window."""

    kind: ClassVar[str] = "none"

    @property
    def capabilities(self) -> Capability:
        """None, so that only joins without memory take it."""
        return Capability.NONE
