"""Memory before attention, one after the other (Titans' memory as layer, MAL)."""

import dataclasses
from typing import ClassVar

from lm2_jax.attention import Beside
from lm2_jax.blocks.base import Carry, Context, LayerState, OpenLayer, Place
from lm2_jax.blocks.per_layer import PerLayerJoin, RunningBlock
from lm2_jax.layers import RMSNorm, constrain
from lm2_jax.parameters import MEMORY
from lm2_jax.types import Array, Float, State


@dataclasses.dataclass(frozen=True)
class LayerJoin(PerLayerJoin):
    """y = [P; x] + Memory(n([P; x])), then y + Attention(n(y)) (arXiv:2501.00663, equations 29-31).

    Attention is as wide as `decoder.window_tokens` says; the rows of y at the persistent tokens P are always in sight.
    The paper shows no residual connection around the memory in its equations, but says that all blocks have one.
    """

    kind: ClassVar[str] = "layer"

    def block(self) -> type["LayerBlock"]:
        """The block of a layer with memory."""
        return LayerBlock


class LayerBlock(RunningBlock):
    """Memory, attention and MLP, each with a residual connection."""

    def setup_join(self) -> None:
        self.memory_norm = RMSNorm(self.spec.precision, self.spec.decoder.norm_epsilon, group=MEMORY)

    def memory_norm_of(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        """Through a norm of its own."""
        return self.memory_norm(x)

    def _opening(self) -> tuple[Beside | None, State]:
        """Persistent tokens as attention sees them, behind the memory, and the start of a document's memory."""
        m_1ND, start = self.opening()
        if m_1ND is None:
            return None, None
        assert self.persistent is not None
        return self.attention.beside(self.attention_norm(self.persistent() + m_1ND)), start

    def forward(
        self, carry: Carry, state: LayerState, context: Context
    ) -> tuple[Carry, tuple[LayerState, dict[str, Array]]]:
        """See the base class."""
        always, start = self._opening()
        m_BJTD, memory, notes = self.remember(self.memory_norm(carry.x), state.memory, start, context.segments)
        x_BJTD = constrain(carry.x + m_BJTD, ("batch", "segments", "time", "embed"))
        attended, window = self.attention(self.attention_norm(x_BJTD), state.window, context.segments, always)
        x_BJTD = constrain(self.feed_forward(x_BJTD + attended.y), ("batch", "segments", "time", "embed"))
        return carry._replace(x=x_BJTD), (LayerState(window, memory), notes)

    def open(
        self, span_BT: Float[Array, "B T"], state: LayerState, start: State
    ) -> tuple[Float[Array, "B T"], OpenLayer]:
        """See the base class."""
        always, begins = self._opening()
        attention = self.attention.open(state.window, len(span_BT), span_BT.shape[1], always)
        return span_BT, OpenLayer(attention, self.open_memory(self.begun(state.memory, begins)))

    def extend(
        self, x_BSD: Float[Array, "B S D"], state: OpenLayer, place: Place
    ) -> tuple[Float[Array, "B S D"], OpenLayer]:
        """See the base class."""
        assert state.attention is not None
        m_BSD, memory = self.memory.extend(self.memory_norm(x_BSD), place.buffer, state.memory)
        x_BSD = x_BSD + m_BSD
        attended, attention = self.attention.extend(
            self.attention_norm(x_BSD), place.position, place.slot, state.attention
        )
        return self.feed_forward(x_BSD + attended.y), OpenLayer(attention, memory)
