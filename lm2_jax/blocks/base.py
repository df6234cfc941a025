"""What every block shares: its modules, its state, and how its data flow is run; see `ports`."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.attention import Attention, ExtraKV
from lm2_jax.attention.layer import window_axes
from lm2_jax.blocks.ports import Buffers, LayerState, OpenLayer, PiecePort, Place, SegmentsPort
from lm2_jax.decoder import DecoderConfig
from lm2_jax.layers import decoder_mlp, decoder_norm, named
from lm2_jax.memory.base import Capability, MemoryConfig, Metrics
from lm2_jax.parameters import Role
from lm2_jax.precision import Precision
from lm2_jax.registry import Family
from lm2_jax.state import Segments
from lm2_jax.types import Array, Float, State

if TYPE_CHECKING:
    from lm2_jax.blocks.stack import StackMemory
    from lm2_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class JoinConfig(Family):
    """Base of all joins, the ways in which a memory meets the decoder; `model.join` of a run."""

    layers_field: ClassVar[str] = "join.layers"  # where `memory_layers` come from, for messages
    takes_full_attention: ClassVar[bool] = False  # whether attention is independent of the memory of its segment

    def requires(self) -> tuple[Capability, ...]:
        """What the memory must be capable of: all of one of these sets."""
        raise NotImplementedError

    def memory_layers(self, num_layers: int) -> tuple[int, ...]:
        """Blocks that have a memory of their own."""
        return ()

    def block(self) -> type["Block"]:
        """The block of a layer with memory."""
        return Block

    def block_of(self, layer: int, spec: "BlockSpec") -> tuple[type["Block"], "BlockSpec"]:
        """The block of one layer and what it is built from; layers with equal ones run as one loop."""
        return (self.block() if layer in self.memory_layers(spec.decoder.num_layers) else Block), spec

    def persistent_tokens(self) -> int:
        """Learned rows in each block that every token sees and no text changes."""
        return 0

    @property
    def looks_ahead(self) -> bool:
        """Whether tokens see later ones of their segment, so that the model is no language model: for parity only."""
        return False

    def takes_packed(self, memory: MemoryConfig) -> bool:
        """Whether a document may begin inside a segment."""
        return True

    def learns_within_segment(self, memory: MemoryConfig) -> bool:
        """Whether a loss depends on writes of its own segment; else only those of segments before it are learned."""
        return False

    def stack(self, spec: "BlockSpec", **linen: Any) -> "StackMemory | None":
        """State of the stack of all blocks, if there is any; `linen` passes on `parent`."""
        return None

    def mutual_rows(self, spec: "BlockSpec") -> tuple[tuple[int, int], ...]:
        """Ranges of positions in a segment, a stack's rows included, whose rows see each other; see `Attention`."""
        return ()

    def check(self, model: "ModelConfig") -> None:
        """Raises ValueError, naming the field to change, where memory, decoder and join do not fit."""
        needed, memory = self.requires(), model.memory
        if not any(one in memory.capabilities if one else not memory.capabilities for one in needed):
            wanted = " or ".join(repr(kind) for kind in _kinds_with(needed))
            missing = min((one & ~memory.capabilities for one in needed), key=lambda one: bin(one.value).count("1"))
            lack = f"cannot {missing.name}" if missing else "is not used there"
            raise ValueError(
                f"join {self.kind!r} takes a memory of kind {wanted}, got {memory.kind!r}, which {lack}; "
                "change model.memory or model.join"
            )
        if model.decoder.max_tokens is not None and not self.takes_full_attention:
            kinds = sorted(kind for kind, join in JoinConfig.registry.items() if join.takes_full_attention)
            raise ValueError(
                f"join {self.kind!r} takes no full attention, only one within segments; set decoder.max_tokens to None "
                f"or model.join to one of {kinds}"
            )
        layers = self.memory_layers(model.decoder.num_layers)
        if layers != tuple(sorted(set(layers))) or (
            layers and not 0 <= layers[0] <= layers[-1] < model.decoder.num_layers
        ):
            raise ValueError(
                f"{self.layers_field}={layers} must be increasing block numbers below decoder.num_layers="
                f"{model.decoder.num_layers}"
            )
        if memory.capabilities:
            memory.check_module(model.decoder.width, model.precision)


def _kinds_with(needed: tuple[Capability, ...]) -> list[str]:
    """Kinds of memory that some setting of theirs gives one of these sets of capabilities, for messages."""
    kinds = []
    for kind, config in MemoryConfig.registry.items():
        offered = config().capabilities | config.optional_capabilities
        if any(one in offered if one else not offered for one in needed):
            kinds.append(kind)
    return sorted(kinds)


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
    shared: State  # a memory that all blocks write in turn, or None


class Context(NamedTuple):
    """What is the same for all blocks: the segments, and the shared memory before them."""

    segments: Segments
    shared_start: State


class PersistentTokens(nn.Module):
    """Learned rows that no text changes (Titans, arXiv:2501.00663, equation 19)."""

    rows: int
    width: int
    precision: Precision

    @nn.compact
    def __call__(self) -> Float[Array, "1 N D"]:
        """In the compute dtype, on the scale of the embedding."""
        init = named(nn.initializers.normal(self.width**-0.5), ("window", "embed"), Role.START)
        start_ND = self.param("start", init, (self.rows, self.width), jnp.dtype(self.precision.params))
        return start_ND[None].astype(jnp.dtype(self.precision.compute))


class Block(nn.Module):
    """A decoder block without memory, and the base of all blocks with one.

    A subclass describes its data flow once, in `flow`. `forward` (full segments) and `open`, `extend`, `close` (one
    segment in pieces) run it. They have the form `(carry, state of this layer, ...) -> (carry, new state of this
    layer)`, so that equal blocks can be scanned.
    """

    spec: BlockSpec
    has_attention: ClassVar[bool] = True
    reads: ClassVar[bool] = False  # whether the flow calls `port.read`
    makes_own_keys: ClassVar[bool] = False  # whether the flow calls `port.own_keys`
    is_shared: ClassVar[bool] = False  # whether the memory is one for all layers

    def setup(self) -> None:
        d, precision = self.spec.decoder, self.spec.precision
        if self.has_attention:
            self.attention_norm = decoder_norm(d, precision)
            self.attention = Attention(d, precision, self.spec.join.mutual_rows(self.spec))
        self.mlp_norm = decoder_norm(d, precision)
        self.mlp = decoder_mlp(d, precision)
        rows = self.spec.join.persistent_tokens()
        self.persistent = PersistentTokens(rows, d.width, precision) if rows else None
        self.setup_memory()

    def setup_memory(self) -> None:
        """Builds what a block with memory adds."""

    def flow(self, x: Array, port: Any) -> Array:
        """h = x + attention(norm(x)), y = h + mlp(norm(h)).

        Args:
          x: the residual stream, [B J T D] or, in pieces, [B S D].
          port: a `SegmentsPort` or a `PiecePort`.
        """
        return self.feed_forward(x + self.attended(self.attention_norm(x), port))

    def attended(self, normed: Array, port: Any) -> Array:
        """Attention of normalised tokens."""
        return self.attention.output(port.attend(port.project(normed)))

    def feed_forward(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        """x + mlp(norm(x))."""
        return x + self.mlp(self.mlp_norm(x))

    def begin_document(self) -> tuple[ExtraKV | None, State]:
        """What a document begins with: persistent tokens as attention sees them, and the memory, one row for all."""
        if self.persistent is None or not self.has_attention:
            return None, None
        return self.attention.kv(self.attention_norm(self.persistent())), None

    def begin_segment(self, state: LayerState, start: State, shared_start: State) -> OpenLayer:
        """An open layer's parts that depend on the memory; without one, nothing."""
        return OpenLayer(Buffers(None, None, None), None, None, None, None)

    def written(self, opened: OpenLayer, memory: State) -> State:
        """The memory after a segment that is full; without one, nothing."""
        return None

    def init_state(self, batch: int) -> LayerState:
        """State before the first segment; needs no parameters."""
        attention = Attention(self.spec.decoder, self.spec.precision, parent=None)
        return LayerState(attention.init_window(batch) if self.has_attention else None, None)

    def state_axes(self) -> LayerState:
        """Logical axes of `init_state`."""
        return LayerState(window_axes(self.spec.decoder) if self.has_attention else None, None)

    def merged(self, states: Sequence[LayerState]) -> LayerState:
        """One state of this layer for several texts; attention sees the end of the last one. See `Memory.merged`."""
        return states[-1]

    def init_buffers(self, batch: int, tokens: int) -> Buffers:
        """Buffers of a segment of so many tokens, a stack's prefix and suffix included; needs no parameters."""
        if not self.has_attention:
            return Buffers(None, None, None)
        kv = Attention(self.spec.decoder, self.spec.precision, parent=None).init_keys(batch, tokens)
        return Buffers(kv, kv if self.makes_own_keys else None, None)

    def forward(self, carry: Carry, state: LayerState, context: Context) -> tuple[Carry, tuple[LayerState, Metrics]]:
        """J full segments.

        Args:
          carry: input [B J T D], and the shared memory.
          state: of this layer before the first segment.
          context: what is the same for all blocks.
        Returns:
          Output, and the state after the last segment with diagnostics.
        """
        port = SegmentsPort(self, state, carry.shared, context.shared_start, context.segments)
        x_BJTD = port.shard(self.flow(carry.x, port))
        return Carry(x_BJTD, port.shared), (port.state, port.metrics)

    def open(self, _: None, state: LayerState, buffers: Buffers, shared_start: State) -> tuple[None, OpenLayer]:
        """Begins a segment that arrives in pieces.

        Args:
          state: at the segment's start.
          buffers: from `init_buffers`.
          shared_start: the shared memory at the segment's start, or None.
        """
        prefix, start = self.begin_document()
        if prefix is not None and buffers.kv is not None:
            batch = len(buffers.kv.k)
            prefix = ExtraKV(*(jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in prefix))
        opened = self.begin_segment(state, start, shared_start)
        return None, opened._replace(buffers=buffers, prefix=prefix)

    def extend(
        self, x_BSD: Float[Array, "B S D"], opened: OpenLayer, state: LayerState, place: Place
    ) -> tuple[Float[Array, "B S D"], OpenLayer]:
        """S more tokens of the open segment."""
        port = PiecePort(self, opened, state, place)
        return self.flow(x_BSD, port), port.opened

    def close(self, shared: State, opened: OpenLayer, state: LayerState) -> tuple[State, LayerState]:
        """The state after a segment that is full; `shared` is the shared memory as the block below left it."""
        kv, window = opened.buffers.kv, None
        if kv is not None:
            window = self.attention.last_window(kv, state.window)
        memory = self.written(opened, shared if self.is_shared else state.memory)
        return (memory, LayerState(window, None)) if self.is_shared else (shared, LayerState(window, memory))
