"""Memory instead of attention (Titans' LMM, and recurrences of all kinds)."""

import dataclasses
from typing import ClassVar

from lm2_jax.blocks.base import Carry, Context, LayerState, OpenLayer, Place
from lm2_jax.blocks.per_layer import PerLayerJoin, RunningBlock
from lm2_jax.layers import RMSNorm, SwiGLU, constrain
from lm2_jax.parameters import MEMORY
from lm2_jax.types import Array, Float, State


@dataclasses.dataclass(frozen=True)
class MixerJoin(PerLayerJoin):
    """h = x + Memory(n(x)): the memory is the only thing that mixes tokens (arXiv:2501.00663, section 4.3).

    Blocks outside `layers` keep their attention.
    """

    kind: ClassVar[str] = "mixer"

    def memory_kinds(self) -> tuple[str, ...]:
        """Memories in which a token sees those before it in its segment; a bank shows it past segments only."""
        return ("titans",)

    def block(self) -> type["MixerBlock"]:
        """The block of a layer with memory."""
        return MixerBlock


class MixerBlock(RunningBlock):
    """Memory and MLP, each with a residual connection."""

    def setup(self) -> None:
        d, precision = self.spec.decoder, self.spec.precision
        self.memory_norm = RMSNorm(precision, d.norm_epsilon, group=MEMORY)
        self.mlp_norm = RMSNorm(precision, d.norm_epsilon)
        self.mlp = SwiGLU(d.width, d.mlp_width, precision)
        self.setup_persistent()
        self.setup_memory()

    def memory_norm_of(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        """Through a norm of its own."""
        return self.memory_norm(x)

    def init_state(self, batch: int) -> LayerState:
        """The memory alone."""
        return super().init_state(batch)._replace(window=None)

    def state_axes(self) -> LayerState:
        """Logical axes of `init_state`."""
        return super().state_axes()._replace(window=None)

    def forward(
        self, carry: Carry, state: LayerState, context: Context
    ) -> tuple[Carry, tuple[LayerState, dict[str, Array]]]:
        """See the base class."""
        start = self.opening()[1]
        m_BJTD, memory, notes = self.remember(self.memory_norm(carry.x), state.memory, start, context.segments)
        x_BJTD = constrain(self.feed_forward(carry.x + m_BJTD), ("batch", "segments", "time", "embed"))
        return carry._replace(x=x_BJTD), (LayerState(None, memory), notes)

    def open(
        self, span_BT: Float[Array, "B T"], state: LayerState, start: State
    ) -> tuple[Float[Array, "B T"], OpenLayer]:
        """See the base class."""
        return span_BT, OpenLayer(None, self.open_memory(self.begun(state.memory, self.opening()[1])))

    def extend(
        self, x_BSD: Float[Array, "B S D"], state: OpenLayer, place: Place
    ) -> tuple[Float[Array, "B S D"], OpenLayer]:
        """See the base class."""
        m_BSD, memory = self.memory.extend(self.memory_norm(x_BSD), place.buffer, state.memory)
        return self.feed_forward(x_BSD + m_BSD), OpenLayer(None, memory)
