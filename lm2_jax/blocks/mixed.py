"""Several memories in one model: each part of the decoder has a memory and a join of its own."""

import dataclasses
from typing import ClassVar, NoReturn

from lm2_jax.blocks.base import Block, BlockSpec, JoinConfig
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.memory.base import Capability, MemoryConfig
from lm2_jax.memory.gated_bank import GatedBankConfig


@dataclasses.dataclass(frozen=True)
class Part:
    """Some blocks, what they remember, and how."""

    layers: tuple[int, ...] = (0,)
    """Blocks of this part, from 0."""
    memory: MemoryConfig = GatedBankConfig()
    """What each of them remembers."""
    join: JoinConfig = ResidualJoin()
    """Where it meets attention; `layers` of it stays None."""


@dataclasses.dataclass(frozen=True)
class MixedJoin(JoinConfig):
    """Parts with memories and joins of their own; blocks in no part have none. `model.memory` is 'none'."""

    kind: ClassVar[str] = "mixed"
    layers_field: ClassVar[str] = "join.parts[*].layers"
    parts: tuple[Part, ...] = ()
    """The parts; no block may be in two."""

    def requires(self) -> tuple[Capability, ...]:
        """No memory but those of the parts."""
        return (Capability.NONE,)

    def memory_layers(self, num_layers: int) -> tuple[int, ...]:
        """Blocks of all parts."""
        return tuple(sorted(layer for part in self.parts for layer in part.layers))

    def block(self) -> NoReturn:
        """There is no one block."""
        raise ValueError("join 'mixed' has a block for each part; ask block_of")

    def block_of(self, layer: int, spec: BlockSpec) -> tuple[type[Block], BlockSpec]:
        """That of the layer's part."""
        for part in self.parts:
            if layer in part.layers:
                return part.join.block_of(layer, dataclasses.replace(spec, memory=part.memory, join=part.join))
        return Block, spec

    def takes_packed(self, memory: MemoryConfig) -> bool:
        """If all parts do."""
        return all(part.join.takes_packed(part.memory) for part in self.parts)

    def learns_within_segment(self, memory: MemoryConfig) -> bool:
        """If all parts do."""
        return all(part.join.learns_within_segment(part.memory) for part in self.parts)

    def check(self, model) -> None:
        """See the base class; every part is checked as if it were the full model."""
        if not self.parts:
            raise ValueError("join.parts is empty; for a decoder without memory use memory 'none' and join 'plain'")
        super().check(model)
        for index, part in enumerate(self.parts):
            where = f"join.parts[{index}]"
            if isinstance(part.join, MixedJoin):
                raise ValueError(f"{where}.join is 'mixed' itself; put its parts into join.parts in its place")
            if not part.layers:
                raise ValueError(f"{where}.layers is empty; name its blocks, or leave the part out")
            if getattr(part.join, "layers", None) is not None:
                raise ValueError(f"{where}.join.layers must be None: {where}.layers says which blocks it has")
            try:
                alone = dataclasses.replace(model, memory=part.memory, join=part.join)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if part.join.stack(alone.block_spec, parent=None) is not None or not alone.has_memory:
                raise ValueError(
                    f"{where}.join: {part.join.kind!r} as configured gives no block a memory of its own; "
                    "parts need memories per layer"
                )
