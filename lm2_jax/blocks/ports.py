"""How the data flow of a block meets attention and memory: for full segments, and for pieces of one.

A block describes its data flow once (`Block.flow`), in terms of a port. `SegmentsPort` runs it over J full segments:
what needs no memory is batched over all of them, and `each_segment` scans over them with the memory as carry.
`PiecePort` runs the same flow over S tokens of an unfinished segment. Resets, padding, packed documents, truncated
backpropagation and buffering are handled here and in no block.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.attention import Cache, ExtraKV, Projected, SegmentKV, Window
from lm2_jax.layers import constrain
from lm2_jax.memory.base import INSIGHT, Metrics, TokenInputs
from lm2_jax.state import Segments, begin_rows, clear_start, map_axes, reset_rows, select_rows, stop_where
from lm2_jax.types import Array, Bool, Float, Int, State

if TYPE_CHECKING:
    from lm2_jax.blocks.base import Block


class LayerState(NamedTuple):
    """What one block carries across a segment border."""

    window: Window | Cache | None
    memory: State  # None in a block without a memory of its own


class Buffers(NamedTuple):
    """Space for what a segment that arrives in pieces leaves for its later tokens and its end; T tokens each."""

    kv: ExtraKV | None  # None in a block without attention
    own: ExtraKV | None  # where the flow makes a key of its own for each token
    written: Float[Array, "B T D"] | None  # where the memory is written once the segment is full


class OpenLayer(NamedTuple):
    """One block inside an unfinished segment, beyond its state at the segment's start."""

    buffers: Buffers
    prefix: ExtraKV | None  # rows that every token sees
    prepared: Any  # `Block.prepare` of the memory
    reader: Any  # of the memory at the segment's start
    running: Any  # a running memory after the tokens so far


class Place(NamedTuple):
    """Where S new tokens are in their segment."""

    position: Int[Array, "B S"]  # from the segment's start, a stack's prefix included
    slot: Int[Array, "B S"]  # where their keys are kept; past the end of the buffer for tokens that do not count
    token: Int[Array, "B S"]  # the same for what the memory takes: a stack's prefix and suffix do not count
    valid: Bool[Array, "B S"]  # tokens that the memory takes
    seen: Bool[Array, "B N"] | None = None  # kept keys that may be seen; None: all up to a token's own


class SegmentPort:
    """One full segment and its memory."""

    def __init__(self, block: "Block", reads: State, writes: State, start: State, prefix: Any, segment: Segments):
        """The memory that is read (before the segment) and the one that is written; the same unless it is shared."""
        self.block, self.reads, self.writes, self.start = block, reads, writes, start
        self.prefix, self.segment, self.metrics = prefix, segment, Metrics()
        self.after = writes

    @property
    def prepared(self) -> Any:
        """`Block.prepare` of the memory before the segment."""
        return self.block.prepare(self.reads)

    def attend(self, projected: Projected, prefix: ExtraKV | None = None, own: Any = None) -> Array:
        """Attention heads of the segment; see `Attention.attend`."""
        return self.block.attention.attend(projected, _join_kv(self.prefix, prefix), own)

    def project(self, x_BTD: Float[Array, "B T D"]) -> Projected:
        """Queries, keys and values of normalised tokens, where they depend on the memory."""
        attention, segment = self.block.attention, self.segment
        kv = attention.kv(x_BTD, jnp.arange(x_BTD.shape[1]))
        return Projected(attention.q(x_BTD), SegmentKV(kv.k, kv.v, segment.valid, segment.document))

    def own_keys(self, rows_BTD: Array) -> ExtraKV:
        """A key and value per token, at its position, made of one row per token."""
        _declared(self.block, "makes_own_keys", "makes_own_keys", "own_keys")
        return self.block.attention.kv(rows_BTD, jnp.arange(rows_BTD.shape[1]))

    def recall(self, ask: Callable[[Any], Array]) -> Float[Array, "B T *D"]:
        """`ask(prepared)`; tokens of documents that begin inside the segment ask the start of a document."""
        return self._by_document(lambda memory: ask(self.block.prepare(memory)))

    def read(self, q_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The memory's answer to each token, as of the segment's start."""
        _declared(self.block, "has_reader", "reads", "read")
        module, valid_BT = self.block.memory, self.segment.valid
        q_BTD = jnp.where(valid_BT[:, :, None], q_BTD, 0)
        return self._by_document(lambda memory: module.read(q_BTD, valid_BT, module.reader(memory), self.metrics)[0])

    def _by_document(self, ask: Callable[[State], Array]) -> Array:
        y_BTD = ask(self.reads)
        if self.segment.document is None:
            return y_BTD
        every_B, metrics = jnp.ones(len(y_BTD), bool), self.metrics
        self.metrics = Metrics()  # diagnostics are of the memory that was carried here
        start_BTD = ask(
            begin_memory(reset_rows(self.reads, every_B, self.block.memory_axes), self.start, self.block.memory_axes)
        )
        self.metrics = metrics
        is_carried_BT = self.segment.document == 0
        return jnp.where(is_carried_BT.reshape(*is_carried_BT.shape, *[1] * (y_BTD.ndim - 2)), y_BTD, start_BTD)

    def remember(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The memory running along: its answer to each token, while it takes them."""
        module, valid_BT = self.block.memory, self.segment.valid
        if not self.block.is_running:
            y_BTD = self.read(x_BTD)
            self.after = module.write(x_BTD, self.writes, valid_BT, self.metrics)
            return y_BTD
        document, reset_BT = self.segment.document, None
        if document is not None:
            reset_BT = jnp.pad(document[:, 1:] != document[:, :-1], ((0, 0), (1, 0)))
        y_BTD, opened = module.advance(TokenInputs(x_BTD, valid_BT, reset_BT), module.open(self.writes), self.metrics)
        self.after = module.close(opened, self.writes)
        return y_BTD

    def write(self, x_BTD: Float[Array, "B T D"] | None, projected: Projected) -> None:
        """The memory takes the segment; of several documents only the last one, into the start of a document."""
        document, valid_BT, before = self.segment.document, self.segment.valid, self.writes
        if document is not None:
            last_B1 = jnp.where(valid_BT, document, 0).max(axis=1, keepdims=True)
            valid_BT = valid_BT & (document == last_B1)
            axes = self.block.memory_axes
            before = begin_memory(reset_rows(before, last_B1[:, 0] > 0, axes), self.start, axes)
        kv = ExtraKV(projected.kv.k, projected.kv.v)
        self.after = self.block.write(x_BTD, kv, valid_BT, before, self.metrics)

    def write_suffix(self, x_BTD: Float[Array, "B T D"]) -> None:
        """The memory takes the rows that a stack has added after the segment."""
        rows_BND = x_BTD[:, self.block.spec.segment_tokens :]
        self.after = self.block.memory.write(rows_BND, self.writes, jnp.ones(rows_BND.shape[:2], bool), self.metrics)


class SegmentsPort:
    """J full segments."""

    def __init__(self, block: "Block", state: LayerState, shared: State, shared_start: State, segments: Segments):
        """State of the layer, and the memory that all layers share before (`shared_start`) and as it is written."""
        self.block, self.state, self.segments, self.metrics = block, state, segments, Metrics()
        self.shared, self.shared_start = shared, shared_start
        self.prefix, self.start = block.begin_document()
        self.is_scanned = False

    def shard(self, x_BJTD: Array) -> Array:
        """The residual stream, sharded like a batch."""
        return constrain(x_BJTD, ("batch", "segments", "time", "embed"))

    def project(self, x_BJTD: Float[Array, "B J T D"]) -> Projected:
        """Queries, keys and values of normalised tokens."""
        projected, window = self.block.attention.project(x_BJTD, self.state.window, self.segments)
        self.state = self.state._replace(window=window)
        return projected

    def attend(self, projected: Projected) -> Array:
        """Attention heads of all segments; see `Attention.attend`."""
        return self.block.attention.attend(projected, self.prefix)

    def remember(self, x_BJTD: Float[Array, "B J T D"]) -> Float[Array, "B J T D"]:
        """`SegmentPort.remember` for each segment."""
        return self.each_segment(lambda _, port, x_BTD: port.remember(x_BTD), x_BJTD)

    def each_segment(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(block, port, *args of the segment)`, one segment after the other, each with the memory before it."""
        assert not self.is_scanned, "a flow may pass through the memory once"
        self.is_scanned, is_shared, axes = True, self.block.is_shared, self.block.memory_axes
        start, prefix, shared_start = self.start, self.prefix, self.shared_start

        def step(block: "Block", memory: State, inputs: tuple[Any, Segments]) -> tuple[State, Any]:
            args, segment = inputs
            if not is_shared:  # the stack does this for a memory that all layers share
                memory = stop_where(segment.cut, reset_rows(memory, segment.reset, axes))
            has_tokens_B = segment.valid[:, : block.spec.segment_tokens].any(axis=1)  # no rows of a stack
            # Rows of padding compute with the start, so that nothing of their state enters a gradient, not even NaN.
            begun = memory if is_shared else begin_memory(reset_rows(memory, ~has_tokens_B, axes), start, axes)
            reads = shared_start if is_shared else begun
            port = SegmentPort(block, reads, begun, start, prefix, segment)
            out = fn(block, port, *args)
            after = clear_start(port.after, axes)
            return select_rows(has_tokens_B, after, memory, axes), (out, port.metrics)

        scan = nn.scan(step, variable_broadcast="params", variable_axes={INSIGHT: 0}, split_rngs={"params": False})
        inputs = (
            by_segment(args),
            segments_first(self.segments),
        )
        memory, (out, metrics) = scan(self.block, self.shared if is_shared else self.state.memory, inputs)
        if is_shared:
            self.shared = memory
        else:
            self.state = self.state._replace(memory=memory)
        self.metrics.update(jax.tree.map(jnp.mean, metrics))
        return by_segment(out)


class PiecePort:
    """S tokens of an unfinished segment; rows may be at different positions."""

    def __init__(self, block: "Block", opened: OpenLayer, state: LayerState, place: Place):
        """`state` is the layer's at the segment's start."""
        self.block, self.opened, self.state, self.place, self.metrics = block, opened, state, place, Metrics()

    @property
    def prepared(self) -> Any:
        """`Block.prepare` of the memory before the segment."""
        return self.opened.prepared

    def shard(self, x_BSD: Array) -> Array:
        """The residual stream as it is."""
        return x_BSD

    def _keep(self, name: str, new: Any, slot_BS: Array) -> Any:
        """Puts an array for each new token into a buffer."""
        rows = jnp.arange(slot_BS.shape[0])[:, None]
        old = getattr(self.opened.buffers, name)
        kept = jax.tree.map(lambda o, n: o.at[rows, slot_BS].set(n.astype(o.dtype), mode="drop"), old, new)
        self.opened = self.opened._replace(buffers=self.opened.buffers._replace(**{name: kept}))
        return kept

    def project(self, x_BSD: Float[Array, "B S D"]) -> Projected:
        """Queries of the tokens, and keys and values of the segment so far."""
        attention, past = self.block.attention, self.state.window
        first = attention.first_position(past, self.block.spec.segment_tokens)
        position_BS = self.place.position + jnp.reshape(first, (-1, 1))
        kv = self._keep("kv", attention.kv(x_BSD, position_BS), self.place.slot)
        return Projected(attention.q(x_BSD), SegmentKV(*kv, valid=self.place.seen, past=past, position=position_BS))

    def attend(self, projected: Projected, prefix: ExtraKV | None = None, own: Any = None) -> Array:
        """Attention heads of the tokens; causality hides the later places of the buffers."""
        prefix = _join_kv(self.opened.prefix, prefix)
        return self.block.attention.attend(projected, prefix, own, self.place.position)

    def own_keys(self, rows_BSD: Array) -> ExtraKV:
        """See `SegmentPort.own_keys`."""
        return self._keep("own", self.block.attention.kv(rows_BSD, self.place.position), self.place.slot)

    def each_segment(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(block, port, *args)`: there is one segment."""
        return fn(self.block, self, *args)

    def recall(self, ask: Callable[[Any], Array]) -> Array:
        """See `SegmentPort.recall`."""
        return ask(self.opened.prepared)

    def read(self, q_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """See `SegmentPort.read`."""
        q_BSD = jnp.where(self.place.valid[:, :, None], q_BSD, 0)
        y_BSD, reader = self.block.memory.read(q_BSD, self.place.valid, self.opened.reader)
        self.opened = self.opened._replace(reader=reader)
        return y_BSD

    def _inputs(self, x_BSD: Array) -> TokenInputs:
        return TokenInputs(x_BSD, self.place.valid, None, self.place.token)

    def remember(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """See `SegmentPort.remember`."""
        if not self.block.is_running:
            y_BSD = self.read(x_BSD)
            self._keep("written", x_BSD, self.place.token)
            return y_BSD
        y_BSD, running = self.block.memory.advance(self._inputs(x_BSD), self.opened.running)
        self.opened = self.opened._replace(running=running)
        return y_BSD

    def write(self, x_BSD: Float[Array, "B S D"] | None, projected: Projected) -> None:
        """Keeps what the memory takes at the segment's end, unless attention's keys and values are all it needs."""
        if self.block.is_running:
            assert x_BSD is not None
            running = self.block.memory.absorb(self._inputs(x_BSD), self.opened.running)
            self.opened = self.opened._replace(running=running)
        elif self.opened.buffers.written is not None:
            self._keep("written", x_BSD, self.place.token)

    def write_suffix(self, x_BSD: Float[Array, "B S D"]) -> None:
        """See `SegmentPort.write_suffix`."""
        assert self.opened.buffers.written is not None
        rows, T = self.opened.buffers.written.shape[1], self.block.spec.segment_tokens
        self._keep("written", x_BSD, jnp.where(self.place.slot >= T, self.place.slot - T, rows))


def _declared(block: "Block", found: str, flag: str, method: str) -> None:
    """Refuses a flow that could not be streamed, when the model is built."""
    if not getattr(block, found):
        name = type(block).__name__
        raise TypeError(f"{name}.flow calls port.{method}; set `{flag}` of the block, or pieces could not be streamed")


def begin_memory(memory: State, start: State, axes: State) -> State:
    """The memory with `start` in the rows that begin a document, sharded as a state."""
    return map_axes(lambda names, leaf: constrain(leaf, names), axes, begin_rows(memory, start, axes))


def _join_kv(first: ExtraKV | None, second: ExtraKV | None) -> ExtraKV | None:
    """The rows of both; either may have batch 1."""
    if first is None or second is None:
        return first if second is None else second
    batch = max(len(first.k), len(second.k))
    pairs = zip(first, second, strict=True)
    return ExtraKV(
        *(jnp.concatenate([jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in pair], axis=1) for pair in pairs)
    )


def segments_first(segments: Segments) -> Segments:
    """`Segments` for a scan over them."""
    return by_segment(segments._replace(cut=None))._replace(cut=segments.cut)


def one_segment(segment: Segments) -> Segments:
    """`Segments` with J = 1, of one segment of a scan over `segments_first`."""
    cut = None if segment.cut is None else segment.cut[None]
    return jax.tree.map(lambda a: a[:, None], segment._replace(cut=None))._replace(cut=cut)


def by_segment(tree: Any) -> Any:
    """[B J ...] as [J B ...], for a scan over segments; and back."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tree)
