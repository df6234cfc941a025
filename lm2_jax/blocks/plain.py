"""The join of no memory."""

import dataclasses
from typing import ClassVar

from lm2_jax.blocks.base import Block, JoinConfig


@dataclasses.dataclass(frozen=True)
class PlainJoin(JoinConfig):
    """A decoder without memory."""

    kind: ClassVar[str] = "plain"

    def memory_kinds(self) -> tuple[str, ...]:
        """Only none."""
        return ("none",)

    def memory_layers(self, num_layers: int) -> tuple[int, ...]:
        """No block."""
        return ()

    def block(self) -> type[Block]:
        """The plain block."""
        return Block
