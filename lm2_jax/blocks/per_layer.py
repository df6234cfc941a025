"""What joins share that give each of their blocks a memory of its own, running along with the segment."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.attention import Segments
from lm2_jax.blocks.base import Block, JoinConfig, LayerState, OpenLayer, any_valid, by_segment
from lm2_jax.memory.base import Memory, MemoryConfig, Notes
from lm2_jax.partition import whole
from lm2_jax.state import reset_rows, select_rows, stop_where
from lm2_jax.types import Array, Bool, Float, State


@dataclasses.dataclass(frozen=True)
class PerLayerJoin(JoinConfig, abstract=True):
    """Fields and checks of these joins."""

    layers: tuple[int, ...] | None = None
    """Blocks with memory, from 0; None: all."""
    num_persistent: int = 0
    """Learned rows in each block that no text changes: every token sees them, and a document's memory begins with them
    (with join `context` only the former)."""

    def memory_kinds(self) -> tuple[str, ...]:
        """Memories that are read by tokens and written with tokens."""
        return ("gated_bank", "titans")

    def memory_layers(self, num_layers: int) -> tuple[int, ...]:
        """All blocks by default."""
        return tuple(range(num_layers)) if self.layers is None else self.layers

    def persistent_tokens(self) -> int:
        """As configured."""
        return self.num_persistent

    def takes_packed(self, memory: MemoryConfig) -> bool:
        """A memory that runs along cannot begin anew inside a segment."""
        return False

    def learns_within_segment(self, memory: MemoryConfig) -> bool:
        """Where the memory runs along with the tokens."""
        return memory.shows_own_segment

    def check(self, model) -> None:
        """See the base class."""
        super().check(model)
        if self.layers == ():
            raise ValueError("join.layers is empty; for a decoder without memory use memory 'none' and join 'plain'")
        if not 0 <= self.num_persistent <= model.segment_tokens:
            raise ValueError(
                f"join.num_persistent={self.num_persistent} must lie between 0 and model.segment_tokens="
                f"{model.segment_tokens}"
            )
        if model.memory.build(model.decoder.width, model.precision, parent=None).written_by_block:
            raise ValueError(
                f"join {self.kind!r} writes tokens, but memory.write of kind 'block' takes slots that went through the "
                "decoder block; set memory.write to 'slots' or 'paper', or join to 'residual'"
            )


class PerLayerBlock(Block):
    """A block with a memory of its own."""

    def setup_memory(self) -> None:
        self.memory = self._memory()
        self.setup_join()

    def setup_join(self) -> None:
        """Builds what else the join adds."""

    def _memory(self, **linen: Any) -> Memory:
        return self.spec.memory.build(self.spec.decoder.width, self.spec.precision, **linen)

    def _memory_axes(self) -> State:
        return self._memory(parent=None).state_axes()

    def init_state(self, batch: int) -> LayerState:
        """Adds the memory."""
        return super().init_state(batch)._replace(memory=self._memory(parent=None).init_state(batch))

    def state_axes(self) -> LayerState:
        """Logical axes of `init_state`."""
        return super().state_axes()._replace(memory=self._memory_axes())

    def at_border(self, memory: State, reset_B: Bool[Array, " B"], cut: Bool[Array, ""]) -> State:
        """The memory as a segment finds it: reset where a document begins, without gradient where it is cut."""
        return stop_where(cut, reset_rows(memory, reset_B, self._memory_axes()))

    def open_memory(self, memory: State) -> Any:
        """Begins a segment of the memory that arrives in pieces."""
        return self.memory.open(memory, self.spec.segment_tokens, jnp.dtype(self.spec.precision.compute))

    def close(self, thread: State, state: OpenLayer, _: Any) -> tuple[State, LayerState]:
        """The state after a segment that is full."""
        window = None if state.attention is None else self.attention.close(state.attention)
        return thread, LayerState(window, self.memory.close(state.memory))


class RunningBlock(PerLayerBlock):
    """A block whose memory takes the same tokens in every segment, at its own pace beside or before attention."""

    def memory_norm_of(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        """A residual stream as the memory takes it."""
        raise NotImplementedError

    def opening(self) -> tuple[Float[Array, "1 N D"] | None, State]:
        """What persistent tokens do to the memory of a document that begins: the same for all, so computed once.

        They are followed by padding up to a whole segment, so that the first token of the text begins a chunk.

        Returns:
          The memory's output at the persistent tokens, and its state after them, batch 1; None where there are none.
        """
        if self.persistent is None:
            return None, None
        x_1ND, T = self.memory_norm_of(self.persistent()), self.spec.segment_tokens
        N = x_1ND.shape[1]
        valid_1T = (jnp.arange(T) < N)[None]
        with whole("batch"):  # one document for all rows
            fresh = self._memory(parent=None).init_state(1)
            y_1TD, start = self.memory(jnp.pad(x_1ND, ((0, 0), (0, T - N), (0, 0))), fresh, valid_1T)
        return y_1TD[:, :N], start

    def begun(self, memory: State, start: State) -> State:
        """The memory with what persistent tokens left in the rows where a document begins."""
        return memory if start is None else select_rows(memory.fresh, start, memory, self._memory_axes())

    def remember(
        self, x_BJTD: Float[Array, "B J T D"], memory: State, start: State, segments: Segments
    ) -> tuple[Float[Array, "B J T D"], State, Notes]:
        """The running memory over J segments.

        Args:
          x_BJTD: what it takes.
          memory: before the first segment.
          start: of documents, from `opening`.
          segments: borders and padding.
        Returns:
          Its output at each token, the memory after the last segment, and diagnostics.
        """

        def step(block: "RunningBlock", memory: State, inputs: tuple[Array, ...]) -> tuple[State, Any]:
            x_BTD, valid_BT, reset_B, cut = inputs
            memory, notes = block.at_border(memory, reset_B, cut), {}
            y_BTD, after = block.memory(x_BTD, block.begun(memory, start), valid_BT, notes)
            return select_rows(any_valid(valid_BT), after, memory, block._memory_axes()), (y_BTD, notes)

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        inputs = (*by_segment((x_BJTD, segments.valid, segments.reset)), segments.cut)
        memory, (y_JBTD, notes) = scan(self, memory, inputs)
        return by_segment(y_JBTD), memory, jax.tree.map(jnp.mean, notes)
