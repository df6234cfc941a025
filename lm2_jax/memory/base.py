"""The one interface that every memory implements; docs/adding_a_memory.md is its guide."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.parameters import MEMORY
from lm2_jax.precision import Precision
from lm2_jax.registry import Family
from lm2_jax.types import Array, Bool, Float, Int, State

Notes = dict[str, Array]  # diagnostics that a call adds to, scalars by name


@dataclasses.dataclass(frozen=True)
class MemoryConfig(Family):
    """Base of all memory configs; `model.memory` of a run."""

    @property
    def can_be_threaded(self) -> bool:
        """Whether all blocks may write one state in turn: if what a document begins with is no parameter of a block."""
        return False

    def build(self, width: int, precision: Precision, **linen: Any) -> "Memory":
        """The module for a decoder of this width; `linen` passes on `name` or `parent`."""
        raise NotImplementedError

    @property
    def takes_packed(self) -> bool:
        """Whether a segment may hold several documents: if what a read says to a token depends on that token alone."""
        return False

    @property
    def shows_own_segment(self) -> bool:
        """Whether a running call shows a token what the tokens of its segment up to it have written."""
        return False

    def check_segment(self, segment_tokens: int) -> None:
        """Raises ValueError, naming the field to change, where the memory cannot work in such segments."""


class OpenMemory(NamedTuple):
    """A memory inside an unfinished segment: reads see `state`, writes wait in `buffer`."""

    state: State  # at the segment's start
    prepared: Any  # what a read needs of it, computed once
    buffer: Float[Array, "B T D"]


class Memory(nn.Module):
    """What is stored, and how; where it meets attention is the join's business.

    Reads and writes take one segment. Every NamedTuple of a state has a field `fresh` [B]: true where a row begins
    a document, whatever else the row holds. The module puts its start in there, so that a state is made without
    parameters, a reset sets one flag, and a learned start gets its gradient. `write` returns `fresh` false.
    """

    parameter_group: ClassVar[str] = MEMORY  # of every parameter made below this module

    @property
    def top_k(self) -> int | None:
        """How many rows a query of the join's own may see; None: all."""
        return None

    @property
    def written_by_block(self) -> bool:
        """Whether `write` takes the memory's own rows, after they went through the block, instead of tokens."""
        return False

    def init_state(self, batch: int) -> State:
        """A state of `batch` fresh rows; needs no parameters."""
        raise NotImplementedError

    def state_axes(self) -> State:
        """The same tree with the logical axis names of each array."""
        raise NotImplementedError

    def prepare(self, state: State) -> Any:
        """What `read` needs of a state and no query changes, such as projected keys."""
        return state

    def read(
        self, q_BTD: Float[Array, "B T D"], state: State, prepared: Any = None, notes: Notes | None = None
    ) -> Float[Array, "B T D"]:
        """What stood in the memory at the segment's start, asked by each token.

        Args:
          q_BTD: queries, in the compute type; zero at padding, as a memory may look at neighbours of a token.
          state: at the segment's start.
          prepared: `prepare(state)`, where the caller has it already.
          notes: diagnostics are added here.
        Returns:
          [B T D] in the compute type.
        """
        raise NotImplementedError

    def rows(self, state: State) -> Float[Array, "B N D"] | None:
        """The memory as rows that a join can attend to with its own projections; None where there are none."""
        return None

    def asking_rows(self, state: State) -> Float[Array, "B N D"] | None:
        """The rows as they go through the block, where `written_by_block`; by default those that are read."""
        return self.rows(state)

    def write(
        self, x_BTD: Float[Array, "B T D"], state: State, valid_BT: Bool[Array, "B T"], notes: Notes | None = None
    ) -> State:
        """The state after a segment, of which only valid tokens count.

        The caller keeps the old state for rows without a valid token.
        """
        raise NotImplementedError

    def __call__(
        self, x_BTD: Float[Array, "B T D"], state: State, valid_BT: Bool[Array, "B T"], notes: Notes | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Reads and writes a segment; token i may see writes of tokens <= i. Here: read all, then write all."""
        return self.read(x_BTD, state, notes=notes), self.write(x_BTD, state, valid_BT, notes)

    def open(self, state: State, segment_tokens: int, dtype: jnp.dtype) -> Any:
        """Begins a segment that arrives in pieces: an `OpenMemory`, or a tuple of the memory's own."""
        batch = self.rows_of(state)
        width = getattr(self, "width")  # noqa: B009 (every memory has it as a field, the base class has no fields)
        return OpenMemory(state, self.prepare(state), jnp.zeros((batch, segment_tokens, width), dtype))

    def store(self, x_BSD: Float[Array, "B S D"], slot_BS: Int[Array, "B S"], open_state: OpenMemory) -> OpenMemory:
        """Keeps what will be written; entries whose `slot_BS` is not below T are dropped."""
        rows = jnp.arange(x_BSD.shape[0])[:, None]
        buffer = open_state.buffer.at[rows, slot_BS].set(x_BSD.astype(open_state.buffer.dtype), mode="drop")
        return open_state._replace(buffer=buffer)

    def close(self, open_state: OpenMemory) -> State:
        """The state after a segment that is full."""
        return self.write(open_state.buffer, open_state.state, jnp.ones(open_state.buffer.shape[:2], bool))

    def extend(
        self, x_BSD: Float[Array, "B S D"], slot_BS: Int[Array, "B S"], open_state: OpenMemory
    ) -> tuple[Float[Array, "B S D"], OpenMemory]:
        """`__call__` for a piece of a segment; the caller calls `close` once the segment is full."""
        y_BSD = self.read(x_BSD, open_state.state, open_state.prepared)
        return y_BSD, self.store(x_BSD, slot_BS, open_state)

    def ask(
        self, x_BSD: Float[Array, "B S D"], slot_BS: Int[Array, "B S"], open_state: Any
    ) -> tuple[Float[Array, "B S D"], Any]:
        """`read` for a piece of a segment: the memory as it stood at the segment's start."""
        return self.read(x_BSD, open_state.state, open_state.prepared), open_state

    @staticmethod
    def rows_of(state: State) -> int:
        """Batch size of a state."""
        return state.fresh.shape[0]


def note(notes: Notes | None, **values: Array) -> None:
    """Adds means to the diagnostics, where somebody collects them."""
    if notes is not None:
        notes.update({name: jnp.mean(value.astype(jnp.float32)) for name, value in values.items()})
