"""Memory instead of attention (Titans' LMM, and recurrences of all kinds)."""

import dataclasses
from typing import Any, ClassVar

from lm2_jax.attention import ExtraKV
from lm2_jax.blocks.memory_block import MemoryBlock, RunningJoin
from lm2_jax.layers import RMSNorm
from lm2_jax.memory.base import Capability
from lm2_jax.parameters import MEMORY
from lm2_jax.types import Array, State


@dataclasses.dataclass(frozen=True)
class MixerJoin(RunningJoin):
    """h = x + Memory(n(x)): the memory alone mixes tokens (arXiv:2501.00663, section 4.3).

    Blocks outside `layers` keep their attention.
    """

    kind: ClassVar[str] = "mixer"
    takes_full_attention: ClassVar[bool] = True

    def requires(self) -> tuple[Capability, ...]:
        """A token must see those before it in its segment; a store shows it past segments only."""
        return (Capability.RUNNING,)

    def block(self) -> type["MixerBlock"]:
        """The block of a layer with memory."""
        return MixerBlock


class MixerBlock(MemoryBlock):
    """Memory and MLP, each with a residual connection."""

    has_attention: ClassVar[bool] = False

    def setup_join(self) -> None:
        self.memory_norm = RMSNorm(self.spec.precision, self.spec.decoder.norm_epsilon, group=MEMORY)

    def begin_document(self) -> tuple[ExtraKV | None, State]:
        """A document's memory begins with the persistent tokens."""
        if self.persistent is None:
            return super().begin_document()
        return None, self.after_persistent(self.memory_norm(self.persistent()))[1]

    def flow(self, x: Array, port: Any) -> Array:
        """See `MixerJoin`."""
        return self.feed_forward(x + port.remember(self.memory_norm(x)))
