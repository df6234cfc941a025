"""The join of no memory."""

import dataclasses
from typing import ClassVar

from lm2_jax.blocks.base import JoinConfig
from lm2_jax.memory.base import Capability


@dataclasses.dataclass(frozen=True)
class PlainJoin(JoinConfig):
    """A decoder without memory."""

    kind: ClassVar[str] = "plain"
    takes_full_attention: ClassVar[bool] = True
    num_persistent: int = 0
    """Learned rows in each block that every token sees and no text changes."""

    def __post_init__(self) -> None:
        if self.num_persistent < 0:
            raise ValueError(f"join.num_persistent must not be negative, got {self.num_persistent}")

    def requires(self) -> tuple[Capability, ...]:
        """No memory."""
        return (Capability.NONE,)

    def persistent_tokens(self) -> int:
        """As configured."""
        return self.num_persistent
