"""Memory beside attention, combined by a gate (Titans' memory as gate, MAG)."""

import dataclasses
from typing import ClassVar

from lm2_jax.blocks.base import Carry, Context, LayerState, OpenLayer, Place
from lm2_jax.blocks.combine import CombineConfig, Product
from lm2_jax.blocks.per_layer import PerLayerJoin, RunningBlock
from lm2_jax.layers import constrain
from lm2_jax.types import Array, Float, State


@dataclasses.dataclass(frozen=True)
class GateJoin(PerLayerJoin):
    """h = x + combine(Attention([P; n(x)]), Memory([P; n(x)])) (arXiv:2501.00663, equations 26-28).

    Attention is as wide as `decoder.window_tokens` says; persistent tokens P are always in sight.
    """

    kind: ClassVar[str] = "gate"
    combine: CombineConfig = Product()
    """How both outputs become one."""

    def block(self) -> type["GateBlock"]:
        """The block of a layer with memory."""
        return GateBlock


class GateBlock(RunningBlock):
    """Attention and memory side by side on the same normalised input."""

    def setup_join(self) -> None:
        assert isinstance(self.spec.join, GateJoin)
        self.combine = self.spec.join.combine.build(self.spec.decoder.width, self.spec.precision)

    def memory_norm_of(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        """As attention takes it."""
        return self.attention_norm(x)

    def forward(
        self, carry: Carry, state: LayerState, context: Context
    ) -> tuple[Carry, tuple[LayerState, dict[str, Array]]]:
        """See the base class."""
        normed_BJTD = self.attention_norm(carry.x)
        attended, window = self.attention(normed_BJTD, state.window, context.segments, self.visible())
        m_BJTD, memory, notes = self.remember(normed_BJTD, state.memory, self.opening()[1], context.segments)
        x_BJTD = self.feed_forward(carry.x + self.combine(attended.y, m_BJTD, notes))
        x_BJTD = constrain(x_BJTD, ("batch", "segments", "time", "embed"))
        return carry._replace(x=x_BJTD), (LayerState(window, memory), notes)

    def open(
        self, span_BT: Float[Array, "B T"], state: LayerState, start: State
    ) -> tuple[Float[Array, "B T"], OpenLayer]:
        """See the base class."""
        span_BT, layer = super().open(span_BT, state, start)
        return span_BT, layer._replace(memory=self.open_memory(self.begun(state.memory, self.opening()[1])))

    def extend(
        self, x_BSD: Float[Array, "B S D"], state: OpenLayer, place: Place
    ) -> tuple[Float[Array, "B S D"], OpenLayer]:
        """See the base class."""
        assert state.attention is not None
        normed_BSD = self.attention_norm(x_BSD)
        attended, attention = self.attention.extend(normed_BSD, place.position, place.slot, state.attention)
        m_BSD, memory = self.memory.extend(normed_BSD, place.buffer, state.memory)
        return self.feed_forward(x_BSD + self.combine(attended.y, m_BSD, {})), OpenLayer(attention, memory)
