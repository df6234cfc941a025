"""Attention and memory in parallel, combined by a gate (Titans' memory as gate, MAG)."""

import dataclasses
from typing import Any, ClassVar

from lm2_jax.attention import ExtraKV
from lm2_jax.blocks.combine import CombineConfig, Product
from lm2_jax.blocks.memory_block import MemoryBlock, RunningJoin
from lm2_jax.types import Array, State


@dataclasses.dataclass(frozen=True)
class GateJoin(RunningJoin):
    """h = x + combine(Attention([P; n(x)]), Memory([P; n(x)])) (arXiv:2501.00663, equations 26-28).

    Attention reaches as far as `decoder.window_tokens` says; every token sees the persistent tokens P.
    """

    kind: ClassVar[str] = "gate"
    takes_full_attention: ClassVar[bool] = True
    combine: CombineConfig = Product()
    """How both outputs become one."""

    def block(self) -> type["GateBlock"]:
        """The block of a layer with memory."""
        return GateBlock


class GateBlock(MemoryBlock):
    """Attention and memory on the same normalised input."""

    def setup_join(self) -> None:
        assert isinstance(self.spec.join, GateJoin)
        self.combine = self.spec.join.combine.build(self.spec.decoder.width, self.spec.precision)

    def begin_document(self) -> tuple[ExtraKV | None, State]:
        """A document's memory begins with the persistent tokens."""
        kv, start = super().begin_document()
        if self.persistent is not None:
            start = self.after_persistent(self.attention_norm(self.persistent()))[1]
        return kv, start

    def flow(self, x: Array, port: Any) -> Array:
        """See `GateJoin`."""
        normed = self.attention_norm(x)
        y, m = self.attended(normed, port), port.remember(normed)
        return self.feed_forward(x + self.combine(y, m, port.metrics))
