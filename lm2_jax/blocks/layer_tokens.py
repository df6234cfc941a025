"""Memory tokens after each segment, which every layer writes into a memory of its own (ARMT)."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from lm2_jax.blocks.base import BlockSpec
from lm2_jax.blocks.memory_block import LayersJoin, MemoryBlock
from lm2_jax.blocks.ports import Buffers, OpenLayer, begin_memory
from lm2_jax.blocks.stack import ConstantTokens
from lm2_jax.memory.base import Capability, MemoryConfig
from lm2_jax.state import clear_start
from lm2_jax.types import Array, Float, State


@dataclasses.dataclass(frozen=True)
class LayerTokensJoin(LayersJoin):
    """[X; M] = Block([x; m] + Memory([x; m])); the memory then takes M (ARMT, arXiv:2407.04841, equations 1-3).

    x are the segment's tokens and m the memory tokens after them, which enter the first layer as learned rows, the same
    for each segment. Causality hides them from the segment. What goes from segment to segment is the memory alone.
    """

    kind: ClassVar[str] = "layer_tokens"

    def requires(self) -> tuple[Capability, ...]:
        """A memory that tokens read and memory tokens write."""
        return (Capability.LAYER_TOKENS,)

    def takes_packed(self, memory: MemoryConfig) -> bool:
        """The memory tokens of a segment are written for one document."""
        return False

    def block(self) -> type["LayerTokensBlock"]:
        """The block of a layer with memory."""
        return LayerTokensBlock

    def stack(self, spec: BlockSpec, **linen: Any) -> ConstantTokens:
        """The memory tokens."""
        return ConstantTokens(spec, **linen)

    def check(self, model) -> None:
        """See the base class; a window would have to skip the memory tokens between two segments."""
        super().check(model)
        if model.decoder.window_tokens is not None:
            raise ValueError(
                "join 'layer_tokens' has no attention window across segments; set decoder.window_tokens to None"
            )


class LayerTokensBlock(MemoryBlock):
    """Reads the memory, then is a decoder block, then writes its output at the memory tokens."""

    def init_buffers(self, batch: int, tokens: int) -> Buffers:
        """A buffer for the memory tokens alone."""
        shape = (batch, self.spec.memory.stack_tokens, self.spec.decoder.width)
        written = jnp.zeros(shape, jnp.dtype(self.spec.precision.compute))
        return super().init_buffers(batch, tokens)._replace(written=written)

    def prepare(self, memory: State) -> Any:
        """The memory as tokens read it."""
        return self.memory.reader(memory)

    def flow(self, x: Array, port: Any) -> Array:
        """See `LayerTokensJoin`; the schedule gives one segment at a time."""
        return port.each_segment(LayerTokensBlock.through_memory, x)

    def through_memory(self, port: Any, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """One segment and its memory tokens, or a piece of them."""
        x_BTD = x_BTD + port.recall(lambda reader: self.memory.look_up(x_BTD, reader))
        y_BTD = self.feed_forward(x_BTD + self.attended(self.attention_norm(x_BTD), port))
        port.write_suffix(y_BTD)
        return y_BTD

    def written(self, opened: OpenLayer, memory: State) -> State:
        """The memory after the memory tokens of a segment that arrived in pieces."""
        rows_BND = opened.buffers.written
        assert rows_BND is not None
        memory = begin_memory(memory, self.begin_document()[1], self.memory_axes)
        after = self.memory.write(rows_BND, memory, jnp.ones(rows_BND.shape[:2], bool))
        return clear_start(after, self.memory_axes)
