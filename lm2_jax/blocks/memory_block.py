"""What joins share whose blocks have a memory."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lm2_jax.attention import ExtraKV
from lm2_jax.blocks.base import Block, JoinConfig
from lm2_jax.blocks.ports import Buffers, LayerState, OpenLayer, begin_memory
from lm2_jax.memory.base import Capability, Memory, MemoryConfig, Metrics, TokenInputs
from lm2_jax.partition import replicated
from lm2_jax.state import clear_start
from lm2_jax.types import Array, Bool, Float, State


@dataclasses.dataclass(frozen=True)
class LayersJoin(JoinConfig, abstract=True):
    """Joins in which blocks have memories of their own."""

    layers: tuple[int, ...] | None = None
    """Blocks with memory, from 0; None: all."""

    def memory_layers(self, num_layers: int) -> tuple[int, ...]:
        """All blocks by default."""
        return tuple(range(num_layers)) if self.layers is None else self.layers

    def check(self, model) -> None:
        """See the base class."""
        super().check(model)
        if self.layers == ():
            raise ValueError("join.layers is empty; for a decoder without memory use memory 'none' and join 'plain'")


@dataclasses.dataclass(frozen=True)
class RunningJoin(LayersJoin, abstract=True):
    """Joins in which the memory takes the tokens of a segment while it answers them."""

    num_persistent: int = 0
    """Learned rows in each block that no text changes: every token sees them, and a document's memory begins with them
    (with join `context` only the former)."""

    def requires(self) -> tuple[Capability, ...]:
        """A running memory, or one that is read and then written with tokens."""
        return (Capability.RUNNING, Capability.READ | Capability.WRITE)

    def persistent_tokens(self) -> int:
        """As configured."""
        return self.num_persistent

    def takes_packed(self, memory: MemoryConfig) -> bool:
        """Where the memory honours a reset at any token, and a document begins with nothing but the memory's start."""
        return Capability.RUNNING | Capability.PACKED in memory.capabilities and self.num_persistent == 0

    def learns_within_segment(self, memory: MemoryConfig) -> bool:
        """Where the memory runs along with the tokens."""
        return Capability.RUNNING in memory.capabilities

    def check(self, model) -> None:
        """See the base class."""
        if Capability.WRITE_THROUGH_BLOCK in model.memory.capabilities:
            raise ValueError(
                f"join {self.kind!r} writes tokens, but memory.write of kind 'block' takes slots that went through the "
                "decoder block; set memory.write to 'slots' or 'paper', or join to 'residual'"
            )
        super().check(model)
        if not 0 <= self.num_persistent <= model.segment_tokens:
            raise ValueError(
                f"join.num_persistent={self.num_persistent} must be between 0 and model.segment_tokens="
                f"{model.segment_tokens}"
            )


class MemoryBlock(Block):
    """A block with a memory. Its flow may call `port.remember`, `read`, `recall` and `write`, of one segment."""

    def setup_memory(self) -> None:
        self.memory = self.new_memory()
        self.setup_join()

    def setup_join(self) -> None:
        """Builds what else the join adds."""

    def new_memory(self, **linen: Any) -> Memory:
        """The memory's module; with `parent=None` one that is asked for what needs no parameters."""
        return self.spec.memory.build_for(self.spec.decoder, self.spec.precision, **linen)

    @property
    def memory_axes(self) -> State:
        """Logical axes of the memory's state."""
        return self.new_memory(parent=None).state_axes()

    @property
    def is_running(self) -> bool:
        """Whether the memory runs along with the tokens."""
        return Capability.RUNNING in self.spec.memory.capabilities

    @property
    def is_written_through_block(self) -> bool:
        """Whether the memory takes its own rows after they went through the block."""
        return Capability.WRITE_THROUGH_BLOCK in self.spec.memory.capabilities

    def init_state(self, batch: int) -> LayerState:
        """Adds the memory, unless it is the stack's."""
        state = super().init_state(batch)
        return state if self.is_shared else state._replace(memory=self.new_memory(parent=None).init_state(batch))

    def state_axes(self) -> LayerState:
        """Logical axes of `init_state`."""
        axes = super().state_axes()
        return axes if self.is_shared else axes._replace(memory=self.memory_axes)

    def merged(self, states: Sequence[LayerState]) -> LayerState:
        """Merges the memory too, unless it is the stack's."""
        if self.is_shared:
            return super().merged(states)
        memory = self.memory.merged([state.memory for state in states], self.begin_document()[1])
        return super().merged(states)._replace(memory=memory)

    def init_buffers(self, batch: int, tokens: int) -> Buffers:
        """Adds a buffer for a memory that is written at the segment's end."""
        buffers = super().init_buffers(batch, tokens)
        if self.is_running or self.is_written_through_block:
            return buffers
        shape = (batch, self.spec.segment_tokens, self.spec.decoder.width)
        return buffers._replace(written=jnp.zeros(shape, jnp.dtype(self.spec.precision.compute)))

    def begin_document(self) -> tuple[ExtraKV | None, State]:
        """Persistent tokens, and the memory's own start."""
        return super().begin_document()[0], self.memory.start_state()

    def after_persistent(self, x_1ND: Float[Array, "1 N D"]) -> tuple[Float[Array, "1 N D"], State]:
        """The memory's output at persistent tokens, and its state after them: the same for every document.

        Padding up to a full segment follows them, so that the first token of the text is at a segment's start.
        """
        N, T, module = x_1ND.shape[1], self.spec.segment_tokens, self.memory
        inputs = TokenInputs(jnp.pad(x_1ND, ((0, 0), (0, T - N), (0, 0))), (jnp.arange(T) < N)[None])
        with replicated("batch"):  # one row for all documents
            start = module.start_state()
            if self.is_running:
                y_1TD, opened = module.advance(inputs, module.open(start))
                return y_1TD[:, :N], module.close(opened, start)
            y_1TD, _ = module.read(inputs.x, inputs.valid, module.reader(start))
            return y_1TD[:, :N], module.write(inputs.x, start, inputs.valid)

    @property
    def has_reader(self) -> bool:
        """Whether the memory is read as of the segment's start; a store under `port.remember` is, too."""
        return self.reads or (isinstance(self.spec.join, RunningJoin) and not self.is_running)

    def prepare(self, memory: State) -> Any:
        """What the flow needs of a memory, once per segment; `port.prepared`."""
        return None

    def begin_segment(self, state: LayerState, start: State, shared_start: State) -> OpenLayer:
        """The memory with its start, prepared for reads and running."""
        memory = shared_start if self.is_shared else begin_memory(state.memory, start, self.memory_axes)
        return (
            super()
            .begin_segment(state, start, shared_start)
            ._replace(
                prepared=self.prepare(memory),
                reader=self.memory.reader(memory) if self.has_reader else None,
                running=self.memory.open(memory) if self.is_running else None,
            )
        )

    def write(
        self,
        x_BTD: Array | None,
        kv: ExtraKV | None,
        valid_BT: Bool[Array, "B T"],
        memory: State,
        metrics: Metrics | None,
    ) -> State:
        """The memory after a full segment.

        Args:
          x_BTD: what it takes of the tokens; None with WRITE_THROUGH_BLOCK.
          kv: attention's keys and values of the segment, for WRITE_THROUGH_BLOCK.
          valid_BT: tokens that count.
          memory: before the segment.
          metrics: diagnostics are added here.
        """
        module = self.memory
        if self.is_written_through_block:
            assert kv is not None
            rows_BND = module.query_rows(memory)
            x_BTD = self.feed_forward(rows_BND + self.attention.from_end(self.attention_norm(rows_BND), kv, valid_BT))
            valid_BT = jnp.ones(rows_BND.shape[:2], bool)
        assert x_BTD is not None
        if self.is_running:
            return module.close(module.absorb(TokenInputs(x_BTD, valid_BT), module.open(memory), metrics), memory)
        return module.write(x_BTD, memory, valid_BT, metrics)

    def written(self, opened: OpenLayer, memory: State) -> State:
        """The memory after a segment that arrived in pieces and began with `memory`."""
        if self.is_running:
            return clear_start(self.memory.close(opened.running, memory), self.memory_axes)
        if not self.is_shared:
            memory = begin_memory(memory, self.begin_document()[1], self.memory_axes)
        x_BTD, kv = opened.buffers.written, opened.buffers.kv
        valid_BT = jnp.ones((len(memory.is_start), self.spec.segment_tokens), bool)
        return clear_start(self.write(x_BTD, kv, valid_BT, memory, None), self.memory_axes)
