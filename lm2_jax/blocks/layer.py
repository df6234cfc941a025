"""Memory, then attention (Titans' memory as layer, MAL)."""

import dataclasses
from typing import Any, ClassVar

from lm2_jax.attention import ExtraKV
from lm2_jax.blocks.memory_block import MemoryBlock, RunningJoin
from lm2_jax.layers import RMSNorm
from lm2_jax.parameters import MEMORY
from lm2_jax.types import Array, State


@dataclasses.dataclass(frozen=True)
class LayerJoin(RunningJoin):
    """y = [P; x] + Memory(n([P; x])), then y + Attention(n(y)) (arXiv:2501.00663, equations 29-31).

    Attention reaches as far as `decoder.window_tokens` says; every token sees the rows of y at the persistent tokens P.
    The paper shows no residual connection around the memory in its equations, but says that all blocks have one.
    """

    kind: ClassVar[str] = "layer"
    takes_full_attention: ClassVar[bool] = True

    def block(self) -> type["LayerBlock"]:
        """The block of a layer with memory."""
        return LayerBlock


class LayerBlock(MemoryBlock):
    """Memory, attention and MLP, each with a residual connection."""

    def setup_join(self) -> None:
        self.memory_norm = RMSNorm(self.spec.precision, self.spec.decoder.norm_epsilon, group=MEMORY)

    def begin_document(self) -> tuple[ExtraKV | None, State]:
        """A document's memory begins with the persistent tokens; attention sees them after the memory."""
        if self.persistent is None:
            return super().begin_document()
        rows_1ND = self.persistent()
        m_1ND, start = self.after_persistent(self.memory_norm(rows_1ND))
        return self.attention.kv(self.attention_norm(rows_1ND + m_1ND)), start

    def flow(self, x: Array, port: Any) -> Array:
        """See `LayerJoin`."""
        x = port.shard(x + port.remember(self.memory_norm(x)))
        return self.feed_forward(x + self.attended(self.attention_norm(x), port))
