"""What every block offers, whatever joins it: whole segments at once, or one segment in pieces."""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.attention import WINDOW_AXES, Attention, Beside, OpenAttention, Segments, Window
from lm2_jax.decoder import DecoderConfig
from lm2_jax.layers import RMSNorm, SwiGLU, constrain, named
from lm2_jax.memory.base import MemoryConfig
from lm2_jax.parameters import Role
from lm2_jax.precision import Precision
from lm2_jax.registry import Family
from lm2_jax.types import Array, Bool, Float, Int, State

if TYPE_CHECKING:
    from lm2_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class JoinConfig(Family):
    """Base of all joins; `model.join` of a run."""

    layers_field: ClassVar[str] = "join.layers"  # where `memory_layers` come from, for messages

    def memory_kinds(self) -> tuple[str, ...]:
        """Kinds of memory that make sense in this join."""
        raise NotImplementedError

    def memory_layers(self, num_layers: int) -> tuple[int, ...]:
        """Blocks that have a memory of their own."""
        raise NotImplementedError

    def block(self) -> type["Block"]:
        """The block of a layer with memory."""
        raise NotImplementedError

    def block_of(self, layer: int, spec: "BlockSpec") -> tuple[type["Block"], "BlockSpec"]:
        """The block of one layer and what it is built from; layers with equal ones run as one loop."""
        return (self.block() if layer in self.memory_layers(spec.decoder.num_layers) else Block), spec

    def persistent_tokens(self) -> int:
        """Learned rows in each block that every token sees and no text changes."""
        return 0

    def takes_packed(self, memory: MemoryConfig) -> bool:
        """Whether a document may begin inside a segment."""
        return True

    def learns_within_segment(self, memory: MemoryConfig) -> bool:
        """Whether a loss depends on writes of its own segment; else only those of segments before it are learned."""
        return False

    def carrier(self, spec: "BlockSpec", **linen: Any) -> "Carrier | None":
        """What travels through the whole stack with a segment, if anything does; `linen` passes on `parent`."""
        return None

    def check(self, model: "ModelConfig") -> None:
        """Raises ValueError where memory, decoder and join do not fit."""
        if model.memory.kind not in self.memory_kinds():
            raise ValueError(
                f"join {self.kind!r} takes a memory of kind {' or '.join(map(repr, self.memory_kinds()))}, "
                f"got {model.memory.kind!r}; change model.memory or model.join"
            )
        layers = self.memory_layers(model.decoder.num_layers)
        if layers != tuple(sorted(set(layers))) or (
            layers and not 0 <= layers[0] <= layers[-1] < model.decoder.num_layers
        ):
            raise ValueError(
                f"{self.layers_field}={layers} must be increasing block numbers below decoder.num_layers="
                f"{model.decoder.num_layers}"
            )


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """All that a block is built from."""

    decoder: DecoderConfig
    precision: Precision
    segment_tokens: int
    memory: MemoryConfig
    join: JoinConfig


class Carry(NamedTuple):
    """What goes from block to block."""

    x: Float[Array, "B J T D"]
    thread: State  # a memory that all blocks write in turn, or None


class Context(NamedTuple):
    """What all blocks share: the segments, and the threaded memory as it stood before them."""

    segments: Segments
    start: State


class LayerState(NamedTuple):
    """What one block carries across a segment border."""

    window: Window | None
    memory: State


class OpenLayer(NamedTuple):
    """One block inside an unfinished segment."""

    attention: OpenAttention | None  # None in a block without attention
    memory: Any  # what the memory's `open` made, or None


class Place(NamedTuple):
    """Where S new tokens stand in their segment."""

    position: Int[Array, "B S"]  # counted from the segment's start, memory tokens included
    slot: Int[Array, "B S"]  # where their keys are kept; at least the segment's length for tokens that do not count
    buffer: Int[Array, "B S"]  # the same without memory tokens, for what is written at the segment's end


class PersistentTokens(nn.Module):
    """Learned rows that no text changes (Titans, arXiv:2501.00663, equation 19)."""

    rows: int
    width: int
    precision: Precision

    @nn.compact
    def __call__(self) -> Float[Array, "1 N D"]:
        """In the compute type, on the scale of the embedding."""
        init = named(nn.initializers.normal(self.width**-0.5), ("window", "embed"), Role.START)
        start_ND = self.param("start", init, (self.rows, self.width), jnp.dtype(self.precision.params))
        return start_ND[None].astype(jnp.dtype(self.precision.compute))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the base of all joins and the whole of a block without memory.

    Every method has the form `(carry, state of this layer, shared) -> (carry, new state of this layer)`, so that runs
    of equal blocks can be scanned.
    """

    spec: BlockSpec

    def setup(self) -> None:
        d, precision = self.spec.decoder, self.spec.precision
        self.attention_norm = RMSNorm(precision, d.norm_epsilon)
        self.attention = Attention(d, precision)
        self.mlp_norm = RMSNorm(precision, d.norm_epsilon)
        self.mlp = SwiGLU(d.width, d.mlp_width, precision)
        self.setup_persistent()
        self.setup_memory()

    def setup_persistent(self) -> None:
        """Builds the persistent tokens, if the join has any."""
        rows = self.spec.join.persistent_tokens()
        self.persistent = PersistentTokens(rows, self.spec.decoder.width, self.spec.precision) if rows else None

    def setup_memory(self) -> None:
        """Builds what the join adds."""

    def init_state(self, batch: int) -> LayerState:
        """State before the first segment; needs no parameters."""
        attention = Attention(self.spec.decoder, self.spec.precision, parent=None)
        return LayerState(attention.init_window(batch), None)

    def state_axes(self) -> LayerState:
        """Logical axes of `init_state`."""
        return LayerState(WINDOW_AXES if (self.spec.decoder.window_tokens or 1) > 1 else None, None)

    def visible(self) -> Beside | None:
        """Persistent tokens as every token sees them."""
        return None if self.persistent is None else self.attention.beside(self.attention_norm(self.persistent()))

    def feed_forward(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        """x + mlp(norm(x))."""
        return x + self.mlp(self.mlp_norm(x))

    def forward(
        self, carry: Carry, state: LayerState, context: Context
    ) -> tuple[Carry, tuple[LayerState, dict[str, Array]]]:
        """J whole segments.

        Args:
          carry: input [B J T D].
          state: of this layer before the first segment.
          context: borders and padding.
        Returns:
          Output, and the state after the last segment with diagnostics.
        """
        normed_BJTD = self.attention_norm(carry.x)
        attended, window = self.attention(normed_BJTD, state.window, context.segments, self.visible())
        x_BJTD = constrain(self.feed_forward(carry.x + attended.y), ("batch", "segments", "time", "embed"))
        return carry._replace(x=x_BJTD), (state._replace(window=window), {})

    def open(
        self, span_BT: Float[Array, "B T"], state: LayerState, start: State
    ) -> tuple[Float[Array, "B T"], OpenLayer]:
        """Begins a segment that arrives in pieces.

        Args:
          span_BT: its shape says how many rows and tokens, memory tokens included.
          state: at the segment's start.
          start: the threaded memory at the segment's start, or None.
        """
        batch, tokens = span_BT.shape
        return span_BT, OpenLayer(self.attention.open(state.window, batch, tokens, self.visible()), None)

    def extend(
        self, x_BSD: Float[Array, "B S D"], state: OpenLayer, place: Place
    ) -> tuple[Float[Array, "B S D"], OpenLayer]:
        """S more tokens of the open segment."""
        assert state.attention is not None
        attended, attention = self.attention.extend(
            self.attention_norm(x_BSD), place.position, place.slot, state.attention
        )
        return self.feed_forward(x_BSD + attended.y), state._replace(attention=attention)

    def close(self, thread: State, state: OpenLayer, _: Any) -> tuple[State, LayerState]:
        """The state after a segment that is full."""
        assert state.attention is not None
        return thread, LayerState(self.attention.close(state.attention), None)


class Carrier(nn.Module):
    """State of the whole stack: memory tokens, or one memory that all blocks write in turn.

    A model that has one runs segment by segment, because the top of a segment feeds the bottom of the next.
    """

    spec: BlockSpec

    @property
    def extra_tokens(self) -> int:
        """Tokens it adds before a segment, and as many behind it."""
        return 0

    def init_state(self, batch: int) -> State:
        """Fresh rows."""
        raise NotImplementedError

    def state_axes(self) -> State:
        """Logical axes of `init_state`."""
        raise NotImplementedError

    def tokens(self, state: State) -> Float[Array, "B N D"] | None:
        """Rows that stand before the segment, and again behind it."""
        return None

    def thread(self, state: State) -> State:
        """What the blocks write in turn."""
        return None

    def leave(self, state: State, thread: State, tokens_BND: Array | None, notes: dict[str, Array]) -> State:
        """State after a segment.

        Args:
          state: before it.
          thread: as the last block left it.
          tokens_BND: normalised output at the rows behind the segment.
          notes: diagnostics are added here.
        """
        raise NotImplementedError


def any_valid(valid_BT: Bool[Array, "B T"]) -> Bool[Array, " B"]:
    """Rows in which a segment holds anything but padding."""
    return valid_BT.any(axis=1)


def by_segment(tree: Any) -> Any:
    """[B J ...] as [J B ...], for a scan over segments."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tree)
