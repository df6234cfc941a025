"""No memory: the twin that every comparison needs."""

import dataclasses
from typing import Any, ClassVar, NoReturn

from lm2_jax.memory.base import MemoryConfig
from lm2_jax.precision import Precision


@dataclasses.dataclass(frozen=True)
class NoMemory(MemoryConfig):
    """Nothing crosses a segment border but, if configured, the attention window."""

    kind: ClassVar[str] = "none"

    def build(self, width: int, precision: Precision, **linen: Any) -> NoReturn:
        """There is nothing to build: only the join `plain`, which builds no memory, takes this config."""
        raise ValueError("memory 'none' has no module; its join is 'plain'")
