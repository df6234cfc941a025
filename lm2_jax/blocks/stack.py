"""State of the stack of all blocks: memory tokens that travel with a segment, or one memory for all layers."""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, TypeAlias

import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.blocks.base import BlockSpec
from lm2_jax.layers import fsdp_gather, named
from lm2_jax.memory.base import Memory, Metrics
from lm2_jax.memory.tokens import START_AXES
from lm2_jax.parameters import MEMORY, Role
from lm2_jax.types import Array, Bool, Float, State

# A pass of its own through all blocks: rows [B N D] and which of them count [B N] to normalised outputs [B N D].
DecoderPass: TypeAlias = Callable[[Array, Array], Array]


class StackMemory(nn.Module):
    """A memory outside the blocks.

    A model that has one runs segment by segment, because the top of a segment feeds the bottom of the next one.
    """

    spec: BlockSpec
    observes: ClassVar[bool] = False  # whether `observe` takes anything; a stream then keeps the open segment's input
    places_suffix: ClassVar[bool] = True  # whether rows after a segment get the decoder's learned positions

    def setup(self) -> None:
        self.memory = self.new_memory()

    def new_memory(self, **linen) -> Memory:
        """The memory's module; with `parent=None` one that is asked for what needs no parameters."""
        return self.spec.memory.build(self.spec.decoder.width, self.spec.precision, **linen)

    def init_state(self, batch: int) -> State:
        """Rows that begin a document; needs no parameters."""
        return self.new_memory(parent=None).init_state(batch)

    def state_axes(self) -> State:
        """As the memory's."""
        return self.new_memory(parent=None).state_axes()

    def start_state(self) -> State:
        """What a document begins with."""
        return self.memory.start_state()

    @property
    def prefix_tokens(self) -> int:
        """Rows before a segment."""
        return 0

    @property
    def suffix_tokens(self) -> int:
        """Rows after a segment."""
        return 0

    def prefix(self, state: State) -> Float[Array, "B N D"] | None:
        """Rows that go through the blocks before the segment, of a state with its start."""
        return None

    def prefix_valid(self, state: State) -> Bool[Array, "B N"] | None:
        """Which rows of the prefix may be seen; None: all."""
        return None

    def suffix(self, state: State) -> Float[Array, "B N D"] | None:
        """Rows that go through the blocks after the segment."""
        return None

    def preview(self, state: State, x_BTD: Array, valid_BT: Array, decode: DecoderPass) -> State:
        """State before a segment that is known already, with `JoinConfig.looks_ahead`; arguments as of `observe`."""
        return state

    def shared(self, state: State) -> State:
        """What the blocks write in turn, or None."""
        return None

    def update(self, state: State, shared: State, suffix_BND: Array | None, metrics: Metrics | None) -> State:
        """State after a segment.

        Args:
          state: before it.
          shared: as the last block left it.
          suffix_BND: normalised output at the rows after the segment.
          metrics: diagnostics are added here.
        """
        raise NotImplementedError

    def observe(self, state: State, x_BTD: Array, valid_BT: Array, decode: DecoderPass) -> State:
        """State after `update`, with what the segment itself leaves.

        Args:
          state: after `update`.
          x_BTD: the segment as it entered the blocks.
          valid_BT: false at padding.
          decode: a second pass through the blocks.
        """
        return state

    def merged(self, states: Sequence[State]) -> State:
        """One state for several texts; see `Memory.merged`."""
        return self.memory.merged(states, self.start_state())


class SharedMemory(StackMemory):
    """One memory that every block writes in turn, as in LM2's released code, but read as it was before the segment.

    A block that read what the blocks below it wrote in the same segment would see the future.
    """

    def shared(self, state: State) -> State:
        """The memory itself."""
        return state

    def update(self, state: State, shared: State, suffix_BND: Array | None, metrics: Metrics | None) -> State:
        """What the last block left."""
        return shared


class NoState(NamedTuple):
    """The state of a stack that carries nothing."""

    is_start: Bool[Array, " B"]


class ConstantTokens(StackMemory):
    """Learned rows after each segment, the same for all; the blocks carry what they make of them.

    They get no learned position of the decoder: that of a row would be one more learned vector in its place.
    """

    places_suffix: ClassVar[bool] = False

    def setup(self) -> None:
        shape, init = (
            (self.suffix_tokens, self.spec.decoder.width),
            nn.initializers.normal(self.spec.decoder.width**-0.5),
        )
        declared = named(init, START_AXES, Role.START, group=MEMORY)
        self.start_ND = self.param("start", declared, shape, jnp.dtype(self.spec.precision.params))

    def init_state(self, batch: int) -> NoState:
        """Nothing."""
        return NoState(jnp.ones(batch, bool))

    def state_axes(self) -> NoState:
        """Of nothing."""
        return NoState(("batch",))  # pyright: ignore[reportArgumentType]

    def start_state(self) -> NoState:
        """Nothing."""
        return self.init_state(1)

    @property
    def suffix_tokens(self) -> int:
        """m."""
        return self.spec.memory.stack_tokens

    def suffix(self, state: State) -> Float[Array, "B N D"]:
        """The m rows."""
        start_ND = fsdp_gather(
            self.start_ND.astype(jnp.dtype(self.spec.precision.compute)), START_AXES, ("slots", None)
        )
        return jnp.broadcast_to(start_ND[None], (len(state.is_start), *start_ND.shape))

    def update(self, state: State, shared: State, suffix_BND: Array | None, metrics: Metrics | None) -> State:
        """Nothing."""
        return state

    def merged(self, states: Sequence[State]) -> State:
        """Nothing; what was read is in the blocks."""
        return states[-1]


class MemoryTokens(StackMemory):
    """Rows that the decoder reads before a segment and writes after it."""

    @property
    def prefix_tokens(self) -> int:
        """m."""
        return self.spec.memory.stack_tokens

    suffix_tokens = prefix_tokens

    def prefix(self, state: State) -> Float[Array, "B N D"]:
        """The m rows; the same before and after the segment, as in RMT's released code."""
        return self.memory.rows(state)

    suffix = prefix

    def update(self, state: State, shared: State, suffix_BND: Array | None, metrics: Metrics | None) -> State:
        """The decoder's output at the rows after the segment."""
        assert suffix_BND is not None
        return self.memory.write(suffix_BND, state, jnp.ones(suffix_BND.shape[:2], bool), metrics)
