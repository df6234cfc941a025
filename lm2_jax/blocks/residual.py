"""LM2's join: what the memory says is gated and added beside attention; the segment is written after it was read."""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.attention import Attended
from lm2_jax.blocks.base import (
    Block,
    BlockSpec,
    Carrier,
    Carry,
    Context,
    JoinConfig,
    LayerState,
    OpenLayer,
    Place,
    any_valid,
    by_segment,
)
from lm2_jax.layers import Vector, constrain
from lm2_jax.memory.bank_writes import Gate
from lm2_jax.memory.base import Memory, MemoryConfig, Notes, OpenMemory, note
from lm2_jax.memory.gated_bank import BankKeys, attend_slots
from lm2_jax.parameters import Role
from lm2_jax.state import reset_rows, select_rows, stop_where
from lm2_jax.types import Array, Bool, Float, Int, State


@dataclasses.dataclass(frozen=True)
class ResidualJoin(JoinConfig):
    """h = x + Attention(x) + g(Memory), g(y) = sigmoid(y W + b) * y (LM2, arXiv:2502.06049, which has no b)."""

    kind: ClassVar[str] = "residual"
    layers: tuple[int, ...] | None = None
    """Blocks with memory, from 0; None: all."""
    topology: Literal["per_layer", "threaded"] = "per_layer"
    """A memory per block, or one that all blocks write in turn and read as it stood before the segment."""
    read: Literal["own", "shared"] = "shared"
    """Whose projections ask the memory: its own, from the attention output (the paper), or those of self-attention."""
    source: Literal["attention", "block"] = "block"
    """What is written: the attention output (the paper) or the block's output; unused by write form `block`."""
    gate: bool = True
    """The output gate."""
    silent_start: bool = False
    """A scale that starts at 0 on what the memory says: added to a trained decoder, it changes nothing at first."""

    def memory_kinds(self) -> tuple[str, ...]:
        """Memories that read a frozen state and write a segment."""
        return ("gated_bank", "titans")

    def memory_layers(self, num_layers: int) -> tuple[int, ...]:
        """All blocks by default."""
        return tuple(range(num_layers)) if self.layers is None else self.layers

    def takes_packed(self, memory: MemoryConfig) -> bool:
        """Tokens of a document that begins inside a segment are shown a fresh memory."""
        return memory.takes_packed

    def block(self) -> type["ResidualBlock"]:
        """The block of a layer with memory."""
        return ResidualBlock

    def carrier(self, spec: BlockSpec, **linen: Any) -> "ThreadCarrier | None":
        """The one memory, where it is threaded."""
        return ThreadCarrier(spec, **linen) if self.topology == "threaded" else None

    def check(self, model) -> None:
        """See the base class."""
        super().check(model)
        memory = model.memory.build(model.decoder.width, model.precision, parent=None)
        if self.read == "shared" and type(memory).rows is Memory.rows:
            raise ValueError(
                f"join.read='shared' asks the rows of a memory, {model.memory.kind!r} has none; set join.read to 'own'"
            )
        if self.layers == ():
            raise ValueError("join.layers is empty; for a decoder without memory use memory 'none' and join 'plain'")
        if self.topology == "threaded" and not model.memory.can_be_threaded:
            raise ValueError(
                "join.topology='threaded' has one memory for all blocks, which must not begin with what a block "
                "learned; set it to 'per_layer' or, with a bank, memory.start to 'identity'"
            )


class Step(NamedTuple):
    """Inputs of one segment."""

    x: Float[Array, "B T D"]
    attended: Attended
    valid: Bool[Array, "B T"]
    reset: Bool[Array, " B"]
    document: Int[Array, "B T"] | None


class ResidualBlock(Block):
    """A decoder block with a memory beside attention."""

    def setup_memory(self) -> None:
        join, d, precision = self.join, self.spec.decoder, self.spec.precision
        self.memory = self._memory()
        if join.gate:
            self.gate_output = Gate(d.width, precision)
        if join.silent_start:
            self.loudness = Vector((d.width,), ("state_embed",), precision, role=Role.GATE)

    @property
    def join(self) -> ResidualJoin:
        """The join's config."""
        assert isinstance(self.spec.join, ResidualJoin)
        return self.spec.join

    def _memory(self, **linen: Any) -> Memory:
        return self.spec.memory.build(self.spec.decoder.width, self.spec.precision, **linen)

    def _memory_axes(self) -> State:
        return self._memory(parent=None).state_axes()

    def init_state(self, batch: int) -> LayerState:
        """Adds the memory, unless it is threaded and lives in the carrier."""
        state = super().init_state(batch)
        if self.join.topology == "threaded":
            return state
        return state._replace(memory=self._memory(parent=None).init_state(batch))

    def state_axes(self) -> LayerState:
        """Logical axes of `init_state`."""
        axes = super().state_axes()
        return axes if self.join.topology == "threaded" else axes._replace(memory=self._memory_axes())

    def prepare(self, memory: State) -> Any:
        """What reads need of a memory, once per segment."""
        if self.join.read == "own":
            return self.memory.prepare(memory)
        rows_BND = self.memory.rows(memory)
        assert rows_BND is not None
        return BankKeys(*self.attention.kv(rows_BND))

    def recall(
        self,
        attended: Attended,
        memory: State,
        prepared: Any,
        notes: Notes | None = None,
    ) -> Float[Array, "B T D"]:
        """What the memory adds to the residual stream.

        Args:
          attended: self-attention: its output asks through the memory's own projections, its queries through the
            shared ones.
          memory: at the segment's start.
          prepared: `prepare(memory)`.
          notes: diagnostics are added here.
        Returns:
          sigmoid(y W + b) * y in the compute type (equation 3, with E_mem where the paper prints M, and with a bias,
          which starts at 0).
        """
        if self.join.read == "own":
            return self.gated(self.memory.read(attended.y, memory, prepared, notes), notes)
        return self.gated(self.attention.o(attend_slots(attended.q, prepared, self.memory.top_k, notes)), notes)

    def gated(self, y_BTD: Float[Array, "B T D"], notes: Notes | None = None) -> Float[Array, "B T D"]:
        """What was read, as it is added: behind the output gate, and as loud as learned."""
        if self.join.gate:
            gate_BTD = jax.nn.sigmoid(self.gate_output(y_BTD))
            note(notes, gate_output=gate_BTD)
            y_BTD = (y_BTD.astype(gate_BTD.dtype) * gate_BTD).astype(y_BTD.dtype)
        if self.join.silent_start:
            y_BTD = y_BTD * self.loudness()[None, None].astype(y_BTD.dtype)
        return y_BTD

    def forward(
        self, carry: Carry, state: LayerState, context: Context
    ) -> tuple[Carry, tuple[LayerState, dict[str, Array]]]:
        """Attention of all segments at once, then reads and writes segment by segment, then the MLP of all."""
        segments, threaded = context.segments, self.join.topology == "threaded"
        x_BJTD = carry.x
        attended, window = self.attention(self.attention_norm(x_BJTD), state.window, segments)

        def step(block: "ResidualBlock", memory: State, inputs: tuple[Step, Array]) -> tuple[State, Any]:
            segment, cut = inputs
            if not threaded:  # the carrier does this for the one memory of all blocks
                memory = stop_where(cut, reset_rows(memory, segment.reset, block._memory_axes()))
            notes: Notes = {}
            recalled_BTD = block._recall_packed(segment, context.start if threaded else memory, notes)
            h_BTD = segment.x + segment.attended.y + recalled_BTD
            if block.mlp_inside:
                h_BTD = block.feed_forward(h_BTD)
            return block._write_packed(h_BTD, segment, memory, notes), (h_BTD, notes)

        per_segment = Step(x_BJTD, attended, segments.valid, segments.reset, segments.document)
        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        before = carry.thread if threaded else state.memory
        memory, (h_JBTD, notes) = scan(self, before, (by_segment(per_segment), segments.cut))
        h_BJTD = by_segment(h_JBTD)
        if not self.mlp_inside:
            h_BJTD = self.feed_forward(h_BJTD)
        h_BJTD = constrain(h_BJTD, ("batch", "segments", "time", "embed"))
        notes = jax.tree.map(jnp.mean, notes)
        if threaded:
            return Carry(h_BJTD, memory), (LayerState(window, None), notes)
        return carry._replace(x=h_BJTD), (LayerState(window, memory), notes)

    def _recall_packed(self, segment: Step, memory: State, notes: Notes) -> Float[Array, "B T D"]:
        """`recall`; tokens of documents that begin inside the segment see a fresh memory."""
        asking_BTD = jnp.where(segment.valid[:, :, None], segment.attended.y, 0)
        attended = segment.attended._replace(y=asking_BTD)
        y_BTD = self.recall(attended, memory, self.prepare(memory), notes)
        if segment.document is None:
            return y_BTD
        fresh = reset_rows(memory, jnp.ones_like(segment.reset), self._memory_axes())
        start_BTD = self.recall(attended, fresh, self.prepare(fresh))
        return jnp.where((segment.document == 0)[:, :, None], y_BTD, start_BTD)

    def write(
        self, h_BTD: Array, attended: Attended, memory: State, valid_BT: Array, notes: Notes | None = None
    ) -> State:
        """The memory after a segment.

        Args:
          h_BTD: the block's output, where it is what is written.
          attended: self-attention of the segment.
          memory: before the segment.
          valid_BT: tokens that count.
          notes: diagnostics are added here.
        """
        if self.memory.written_by_block:
            rows_BND = self.memory.asking_rows(memory)
            assert rows_BND is not None
            found_BND = self.attention.from_behind(self.attention_norm(rows_BND), attended.k, attended.v, valid_BT)
            rows_BN = jnp.ones(rows_BND.shape[:2], bool)
            return self.memory.write(self.feed_forward(rows_BND + found_BND), memory, rows_BN, notes)
        return self.memory.write(h_BTD if self.join.source == "block" else attended.y, memory, valid_BT, notes)

    @property
    def mlp_inside(self) -> bool:
        """Whether the MLP must run segment by segment, because its output is written."""
        return self.join.source == "block" and not self.memory.written_by_block

    def _write_packed(self, h_BTD: Array, segment: Step, memory: State, notes: Notes) -> State:
        """The memory after a segment; of several documents only the last one is written, into a fresh memory."""
        axes, valid_BT, before = self._memory_axes(), segment.valid, memory
        if segment.document is not None:
            last_B1 = jnp.where(valid_BT, segment.document, 0).max(axis=1, keepdims=True)
            valid_BT = valid_BT & (segment.document == last_B1)
            before = reset_rows(memory, last_B1[:, 0] > 0, axes)
        after = self.write(h_BTD, segment.attended, before, valid_BT, notes)
        return select_rows(any_valid(segment.valid), after, memory, axes)

    def open(
        self, span_BT: Float[Array, "B T"], state: LayerState, start: State
    ) -> tuple[Float[Array, "B T"], OpenLayer]:
        """See the base class."""
        span_BT, layer = super().open(span_BT, state, start)
        threaded = self.join.topology == "threaded"
        memory = start if threaded else state.memory
        kept = 0 if self.memory.written_by_block else self.spec.segment_tokens
        dtype = jnp.dtype(self.spec.precision.compute)
        if self.join.read == "own":
            opened = self.memory.open(memory, kept, dtype)
        else:
            buffer_BTD = jnp.zeros((span_BT.shape[0], kept, self.spec.decoder.width), dtype)
            opened = OpenMemory(memory, self.prepare(memory), buffer_BTD)
        return span_BT, layer._replace(memory=opened._replace(state=None) if threaded else opened)

    def extend(
        self, x_BSD: Float[Array, "B S D"], state: OpenLayer, place: Place
    ) -> tuple[Float[Array, "B S D"], OpenLayer]:
        """Reads the memory as it stood at the segment's start and keeps what is to be written."""
        assert state.attention is not None
        attended, attention = self.attention.extend(
            self.attention_norm(x_BSD), place.position, place.slot, state.attention
        )
        memory = state.memory
        if self.join.read == "own":
            y_BSD, memory = self.memory.ask(attended.y, place.buffer, memory)
            recalled_BSD = self.gated(y_BSD)
        else:
            recalled_BSD = self.recall(attended, memory.state, memory.prepared)
        h_BSD = self.feed_forward(x_BSD + attended.y + recalled_BSD)
        if not self.memory.written_by_block:  # else the keys and values that attention keeps are all the write needs
            memory = self.memory.store(h_BSD if self.join.source == "block" else attended.y, place.buffer, memory)
        return h_BSD, OpenLayer(attention, memory)

    def close(self, thread: State, state: OpenLayer, _: Any) -> tuple[State, LayerState]:
        """Writes the full segment."""
        assert state.attention is not None
        window, threaded = self.attention.close(state.attention), self.join.topology == "threaded"
        opened = state.memory._replace(state=thread) if threaded else state.memory
        if self.memory.written_by_block:
            k_BTGK, v_BTGK = state.attention.k, state.attention.v
            attended = Attended(opened.buffer, opened.buffer, k_BTGK, v_BTGK)  # of which only k and v are used
            memory = self.write(opened.buffer, attended, opened.state, jnp.ones(k_BTGK.shape[:2], bool))
        else:
            memory = self.memory.close(opened)
        return (memory, LayerState(window, None)) if threaded else (thread, LayerState(window, memory))


class ThreadCarrier(Carrier):
    """One memory that every block writes in turn, as in LM2's released code, but read as it stood before the segment.

    A block that read what the blocks below it wrote in the same segment would see the future.
    """

    def _memory(self) -> Memory:
        return self.spec.memory.build(self.spec.decoder.width, self.spec.precision, parent=None)

    def init_state(self, batch: int) -> State:
        """Fresh rows."""
        return self._memory().init_state(batch)

    def state_axes(self) -> State:
        """As the memory's."""
        return self._memory().state_axes()

    def thread(self, state: State) -> State:
        """The memory itself."""
        return state

    def leave(self, state: State, thread: State, tokens_BND: Array | None, notes: Notes) -> State:
        """What the last block left."""
        return thread
