"""LM2's join: the memory's answer is gated and added to attention's; the segment is written after it was read."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax

from lm2_jax.attention import ExtraKV, Projected
from lm2_jax.blocks.base import BlockSpec
from lm2_jax.blocks.memory_block import LayersJoin, MemoryBlock
from lm2_jax.blocks.stack import SharedMemory
from lm2_jax.layers import Vector
from lm2_jax.memory.bank_reads import attend_slots, slot_weights
from lm2_jax.memory.bank_writes import Gate
from lm2_jax.memory.base import READ_WEIGHTS, Capability, MemoryConfig, Metrics, record, reveal
from lm2_jax.parameters import Role
from lm2_jax.types import Array, Float, State


@dataclasses.dataclass(frozen=True)
class ResidualJoin(LayersJoin):
    """h = x + Attention(x) + g(Memory), g(y) = sigmoid(y W + b) * y (LM2, arXiv:2502.06049, which has no b)."""

    kind: ClassVar[str] = "residual"
    topology: Literal["per_layer", "threaded"] = "per_layer"
    """A memory per block, or one that is shared across layers: all blocks write it in turn and read it as it was before
    the segment."""
    read: Literal["own", "shared"] = "shared"
    """Which projections query the memory: its own, from the attention output (the paper), or self-attention's."""
    source: Literal["attention", "block"] = "block"
    """What is written: the attention output (the paper) or the block's output; unused by write form `block`."""
    gate: bool = True
    """The output gate."""
    silent_start: bool = False
    """A scale that starts at 0 on the memory's output (as in ReZero): a memory added to a trained decoder changes
    nothing at first."""

    def requires(self) -> tuple[Capability, ...]:
        """Reads before the segment; writes of any kind."""
        read = Capability.READ
        return (read | Capability.WRITE, read | Capability.WRITE_THROUGH_BLOCK, read | Capability.RUNNING)

    def takes_packed(self, memory: MemoryConfig) -> bool:
        """Tokens of a document that begins inside a segment read the start of a document."""
        return Capability.PACKED in memory.capabilities

    def block(self) -> type["ResidualBlock"]:
        """The block of a layer with memory."""
        return ResidualBlock

    def stack(self, spec: BlockSpec, **linen: Any) -> SharedMemory | None:
        """The one memory, where it is shared."""
        return SharedMemory(spec, **linen) if self.topology == "threaded" else None

    def check(self, model) -> None:
        """See the base class."""
        super().check(model)
        if self.read == "shared" and Capability.ROWS not in model.memory.capabilities:
            raise ValueError(
                f"join.read='shared' asks the rows of a memory, {model.memory.kind!r} has none; set join.read to 'own'"
            )
        if self.topology == "threaded" and Capability.SHAREABLE not in model.memory.capabilities:
            raise ValueError(
                "join.topology='threaded' has one memory for all blocks, which must not begin with what a block "
                "learned; set it to 'per_layer' or, with a bank, memory.start to 'identity'"
            )


class ResidualBlock(MemoryBlock):
    """A decoder block with a memory in parallel to attention."""

    def setup_join(self) -> None:
        join, d, precision = self.join, self.spec.decoder, self.spec.precision
        if join.gate:
            self.gate_output = Gate(d.width, precision)
        if join.silent_start:
            self.loudness = Vector((d.width,), ("state_embed",), precision, role=Role.GATE)

    @property
    def join(self) -> ResidualJoin:
        """The join's config."""
        assert isinstance(self.spec.join, ResidualJoin)
        return self.spec.join

    @property
    def is_shared(self) -> bool:
        """Whether the memory is one for all layers."""
        return self.join.topology == "threaded"

    @property
    def reads(self) -> bool:
        """Whether the memory answers through its own projections."""
        return self.join.read == "own"

    @property
    def writes_block_output(self) -> bool:
        """Whether the MLP must run segment by segment, because its output is written."""
        return self.join.source == "block" and not self.is_written_through_block

    def prepare(self, memory: State) -> ExtraKV | None:
        """The memory's rows under the projections of self-attention."""
        return None if self.reads else self.attention.kv(self.memory.rows(memory))

    def flow(self, x: Array, port: Any) -> Array:
        """Attention of all segments at once, then reads and writes segment by segment, then the MLP of all."""
        projected = port.project(self.attention_norm(x))
        y = self.attention.output(port.attend(projected))
        h = port.each_segment(ResidualBlock.through_memory, x, y, projected)
        return h if self.writes_block_output else self.feed_forward(h)

    def through_memory(
        self, port: Any, x_BTD: Float[Array, "B T D"], y_BTD: Float[Array, "B T D"], projected: Projected
    ) -> Float[Array, "B T D"]:
        """One segment: x + y + what the memory answers; then the memory is written.

        Args:
          port: a port of one segment.
          x_BTD: the residual stream.
          y_BTD: self-attention's output.
          projected: its queries, keys and values.
        """
        if self.reads:
            read_BTD = port.read(y_BTD)
        else:
            top_k, output = self.spec.memory.top_k, self.attention.output
            read_BTD = port.recall(lambda rows: output(attend_slots(projected.q, rows, top_k, port.metrics)))
            reveal(self, READ_WEIGHTS, lambda: slot_weights(projected.q, port.prepared.k, top_k))
        h_BTD = x_BTD + y_BTD + self.gated(read_BTD, port.metrics)
        if self.writes_block_output:
            h_BTD = self.feed_forward(h_BTD)
        port.write(h_BTD if self.join.source == "block" else y_BTD, projected)
        return h_BTD

    def gated(self, y_BTD: Float[Array, "B T D"], metrics: Metrics | None = None) -> Float[Array, "B T D"]:
        """sigmoid(y W + b) * y in the compute dtype (equation 3; E_mem where the paper prints M; b starts at 0)."""
        if self.join.gate:
            gate_BTD = jax.nn.sigmoid(self.gate_output(y_BTD))
            record(metrics, gate_output=gate_BTD)
            y_BTD = (y_BTD.astype(gate_BTD.dtype) * gate_BTD).astype(y_BTD.dtype)
        if self.join.silent_start:
            y_BTD = y_BTD * self.loudness()[None, None].astype(y_BTD.dtype)
        return y_BTD
