"""A memory inside the heads of attention, under attention's own queries, keys and values (Infini-attention)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lm2_jax.attention import ExtraKV, Projected
from lm2_jax.blocks.base import Block
from lm2_jax.blocks.memory_block import LayersJoin, MemoryBlock
from lm2_jax.blocks.ports import Buffers
from lm2_jax.layers import Vector, rotate
from lm2_jax.memory.base import Capability, MemoryConfig, Metrics, record
from lm2_jax.parameters import MEMORY, Role
from lm2_jax.types import Array, Bool, Float, State


@dataclasses.dataclass(frozen=True)
class HeadsJoin(LayersJoin):
    """Per head: g read(q) + (1 - g) Attention(q), g = sigmoid(b); then the segment is written (arXiv:2404.07143).

    The memory sees queries and keys before RoPE. b is one number per head. It hardly moves under the learning rate of
    the other parameters; its role is `gate`, so `optim.rates` can give it a higher one, and it is never decayed.
    """

    kind: ClassVar[str] = "heads"
    gate_bias: float = 0.0
    """b at the start of training, which the paper does not give; 0: half of the output is the memory's."""

    def requires(self) -> tuple[Capability, ...]:
        """A memory of keys and values."""
        return (Capability.HEADS,)

    def takes_packed(self, memory: MemoryConfig) -> bool:
        """Tokens of a document that begins inside a segment read the start of a document."""
        return Capability.PACKED in memory.capabilities

    def block(self) -> type["HeadsBlock"]:
        """The block of a layer with memory."""
        return HeadsBlock


class HeadsBlock(MemoryBlock):
    """A decoder block whose attention heads have a memory each."""

    def setup_join(self) -> None:
        assert isinstance(self.spec.join, HeadsJoin)
        shape, fill = (self.spec.decoder.num_heads,), self.spec.join.gate_bias
        self.gate_memory = Vector(shape, ("heads",), self.spec.precision, fill, role=Role.GATE, group=MEMORY)

    def init_buffers(self, batch: int, tokens: int) -> Buffers:
        """Attention's keys and values are all that the memory takes."""
        return Block.init_buffers(self, batch, tokens)

    def prepare(self, memory: State) -> Any:
        """The memory as queries read it."""
        return self.memory.reader(memory)

    def flow(self, x: Array, port: Any) -> Array:
        """Attention of all segments at once, then the memory segment by segment, then the MLP of all."""
        projected = port.project(self.attention_norm(x))
        heads = port.each_segment(HeadsBlock.through_memory, port.attend(projected), projected)
        return self.feed_forward(x + self.attention.output(heads))

    def through_memory(
        self, port: Any, y_BTHK: Float[Array, "B T H K"], projected: Projected
    ) -> Float[Array, "B T H K"]:
        """The heads of one segment, mixed with what the memory answers; then the memory is written."""
        m_BTHK = port.recall(lambda reader: self.memory.read_heads(projected.q, reader))
        share_H1 = jax.nn.sigmoid(self.gate_memory())[:, None].astype(y_BTHK.dtype)
        record(port.metrics, gate_output=share_H1)
        port.write(None, projected)
        return y_BTHK + share_H1[None, None] * (m_BTHK - y_BTHK)

    def write(
        self,
        x_BTD: Array | None,
        kv: ExtraKV | None,
        valid_BT: Bool[Array, "B T"],
        memory: State,
        metrics: Metrics | None,
    ) -> State:
        """The memory after a full segment, from its rotated keys and its values."""
        assert kv is not None
        k_BTGK = rotate(kv.k.astype(self.memory.inner_dtype), -jnp.arange(kv.k.shape[1]), self.attention.frequencies)
        return self.memory.write_heads(k_BTGK, kv.v, valid_BT, memory, metrics)
