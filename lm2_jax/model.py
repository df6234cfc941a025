"""The language model: embedding, groups of equal blocks, head; all state explicit."""

import functools
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.attention.cache import span_of
from lm2_jax.blocks.base import Block, Carry, Context
from lm2_jax.blocks.ports import INSIGHT, Buffers, Place, by_segment, one_segment, segments_first
from lm2_jax.blocks.stack import StackMemory
from lm2_jax.config import ModelConfig
from lm2_jax.layers import Einsum, Embed, Positions, constrain, decoder_norm
from lm2_jax.length import check_segments
from lm2_jax.model_state import LayerGroup as LayerGroup
from lm2_jax.model_state import ModelState as ModelState
from lm2_jax.model_state import Output as Output
from lm2_jax.model_state import StreamState as StreamState
from lm2_jax.model_state import check_rows as check_rows
from lm2_jax.model_state import first_cache
from lm2_jax.model_state import layer_groups as layer_groups
from lm2_jax.parameters import Role
from lm2_jax.partition import num_shards
from lm2_jax.state import (
    Segments,
    begin_rows,
    clear_start,
    full_segments,
    reset_rows,
    select_rows,
    stack_axes,
    stack_layers,
    stop_where,
)
from lm2_jax.types import Array, Bool, Float, Int, State

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class LanguageModel(nn.Module):
    """Tokens to logits, segment by segment, with the recurrent state in and out."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        d = c.decoder
        self.embed = Embed(c.vocab_size, d.width, c.precision)
        self.groups = [self._scanned(group) for group in layer_groups(c)]
        self.stack = c.join.stack(c.block_spec, name="carrier")
        places = c.placed_tokens
        self.positions = Positions(d.max_positions, d.width, c.precision, places) if d.max_positions else None
        self.final_norm = decoder_norm(d, c.precision)
        if not d.tie_head:
            self.head = Einsum((d.width, c.vocab_size), ("row_width", "vocab"), c.precision, role=Role.HEAD)

    def _unbound(self) -> list[tuple[Block, int]]:
        """A block of each group, to be asked for what needs no parameters, and the group's length."""
        pairs = [(self.config.block_of(group.first), group.length) for group in layer_groups(self.config)]
        return [(block(spec, parent=None), length) for (block, spec), length in pairs]

    @property
    def _unbound_stack(self) -> StackMemory | None:
        return self.config.join.stack(self.config.block_spec, parent=None)

    def _scanned(self, group: LayerGroup) -> Any:
        """One group as a scan over stacked layers; the module's methods keep their meaning for the group."""
        block, spec = self.config.block_of(group.first)
        policy = REMAT_POLICIES[self.config.remat]
        if policy is not None:
            block = nn.remat(block, policy=policy, prevent_cse=False, methods=["forward"])
        axes = {
            "forward": (0, nn.broadcast),
            "open": (0, 0, nn.broadcast),
            "extend": (0, 0, nn.broadcast),
            "close": (0, 0),
        }
        common = {
            "variable_axes": {"params": 0, INSIGHT: 0},
            "split_rngs": {"params": True},
            "length": group.length,
            "metadata_params": {nn.PARTITION_NAME: "layers"},
        }
        scanned = nn.scan(block, methods={name: {"in_axes": axes[name], **common} for name in axes})
        return scanned(spec, name=f"blocks_{group.first}")

    def init_state(self, batch: int) -> ModelState:
        """The state before any text; needs no parameters.

        Raises:
          ValueError: a batch of less than one row.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        groups = tuple(stack_layers(block.init_state(batch), length) for block, length in self._unbound())
        stack = self._unbound_stack
        return ModelState(groups, None if stack is None else stack.init_state(batch))

    def state_axes(self) -> ModelState:
        """The logical axes of `init_state`, in the same tree."""
        stack = self._unbound_stack
        axes = None if stack is None else stack.state_axes()
        return ModelState(tuple(stack_axes(block.state_axes()) for block, _ in self._unbound()), axes)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        state: ModelState,
        reset: Bool[Array, "..."] | None = None,
        valid: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S V"], ModelState]:
        """Logits of K full segments, S = K*T, and the state after them; arguments as of `forward`."""
        out = self.forward(tokens, state, reset, valid, with_logits=True)
        assert out.logits is not None
        return out.logits, out.state

    def forward(
        self,
        tokens: Int[Array, "B S"],
        state: ModelState,
        reset: Bool[Array, "..."] | None = None,
        valid: Bool[Array, "B S"] | None = None,
        *,
        document: Int[Array, "B S"] | None = None,
        bptt_segments: int | None = None,
        with_logits: bool = False,
    ) -> Output:
        """K full segments.

        Args:
          tokens: K*T of them per row, K >= 1.
          state: before the first segment.
          reset: [B K], the row begins a new document at that segment; or [B], before the first one.
          valid: False is padding; a segment of nothing else leaves its row's state bit-equal.
          document: number of the document within its segment, where documents are packed.
          bptt_segments: gradient flows through blocks of this many segments; None: through all.
          with_logits: whether logits are wanted; the loss works from hidden states.
        Raises:
          ValueError: where shapes do not fit, and a document that is longer than `decoder.max_tokens`.
        """
        B, S = tokens.shape
        T = self.config.segment_tokens
        if S == 0 or S % T:
            raise ValueError(
                f"tokens must be full segments of model.segment_tokens={T}, got {S} a row; use lm2_jax.stream"
            )
        self._check_state(B, state)
        check_segments(self.config, state, tokens.shape, reset, valid, document)
        segments = full_segments((B, S // T, T), reset, valid, document, bptt_segments)
        if document is not None and not self.config.takes_packed:
            raise ValueError(
                f"join {self.config.join.kind!r} takes no packed documents, as its state cannot begin anew inside a "
                "segment; use ordered segments"
            )
        x_BJTD = self.embed(tokens.reshape(B, S // T, T))
        # Each device takes its part of the tokens first; in one step, all devices would gather all rows.
        x_BJTD = constrain(x_BJTD, ("copies", "segments", "time", "row_width"))
        x_BJTD = constrain(x_BJTD, ("batch", "segments", "time", "embed"))
        schedule = self._segment_major if self._schedule() == "segment_major" else self._layer_major
        hidden_BJTD, state, aux = schedule(x_BJTD, state, segments)
        hidden_BSD = hidden_BJTD.reshape(B, S, -1)
        return Output(hidden_BSD, self.logits(hidden_BSD) if with_logits else None, state, aux)

    def logits(self, hidden_BSD: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """The head, in the logits' dtype."""
        dtype = jnp.dtype(self.config.precision.logits)
        if self.config.decoder.tie_head:
            logits_BSV = self.embed.attend(hidden_BSD)
        else:
            logits_BSV = self.head("bsd,dv->bsv", hidden_BSD)
        return constrain(logits_BSV.astype(dtype), ("batch", None, "vocab"))

    def _schedule(self) -> Literal["layer_major", "segment_major"]:
        """Segments outside where the top of one feeds the bottom of the next, else layers."""
        if self.config.schedule != "auto":
            return self.config.schedule
        return "layer_major" if self.stack is None else "segment_major"

    def _check_state(self, batch: int, state: ModelState) -> None:
        """Refuses a state of another model or of other rows, which would fail deep inside or be broadcast."""
        expected = jax.eval_shape(lambda: self.init_state(batch))
        try:
            chex.assert_trees_all_equal_structs(state, expected)
            axes = jax.tree.structure(expected).flatten_up_to(self.state_axes())
            for leaf, names in zip(jax.tree.leaves(state), axes, strict=True):
                check_rows(leaf.shape[names.index("batch")] if leaf.ndim == len(names) else batch, batch)
            chex.assert_trees_all_equal_shapes(state, expected)
        except AssertionError as error:
            raise ValueError(f"state is not one of this model; make it with init_state. {error}") from error

    def _layer_major(self, x_BJTD: Array, state: ModelState, segments: Segments) -> tuple[Array, ModelState, dict]:
        """Layers outside, segments inside: what needs no memory is batched over all segments."""
        carry, groups, aux = self._through(Carry(x_BJTD, None), state.groups, Context(segments, None))
        return self.final_norm(carry.x), ModelState(groups, state.stack), aux

    def _through(self, carry: Carry, states: Any, context: Context) -> tuple[Carry, tuple[State, ...], dict]:
        """All blocks, with their states and diagnostics."""
        carry, after, metrics = carry._replace(x=self._placed(carry.x, states, context.segments)), [], []
        for group, group_state in zip(self.groups, states, strict=True):
            carry, (group_state, group_metrics) = group.forward(carry, group_state, context)
            after.append(group_state)
            metrics.append(group_metrics)
        names = sorted({name for group in metrics for name in group})
        aux = {name: jnp.concatenate([group[name] for group in metrics if name in group]) for name in names}
        return carry, tuple(after), aux

    def _placed(self, x_BJTD: Array, states: Any, segments: Segments) -> Array:
        """Adds learned positions, if the decoder has them: in the segment, or with a cache in the document."""
        if self.positions is None:
            return x_BJTD
        cache = first_cache(states)
        position = jnp.arange(x_BJTD.shape[2])[None, None] if cache is None else span_of(cache, segments).position
        return x_BJTD + self.positions(position)

    def _segment_major(self, x_BJTD: Array, state: ModelState, segments: Segments) -> tuple[Array, ModelState, dict]:
        """Segments outside, all layers inside."""

        def body(model: "LanguageModel", state: ModelState, inputs: tuple[Array, Segments]) -> tuple[ModelState, Any]:
            x_BTD, one = inputs
            y_BTD, state, aux = model._one_segment(x_BTD, state, one_segment(one))
            return state, (y_BTD, aux)

        scan = nn.scan(body, variable_broadcast="params", variable_axes={INSIGHT: 0}, split_rngs={"params": False})
        state, (y_JBTD, aux) = scan(self, state, (by_segment(x_BJTD), segments_first(segments)))
        return by_segment(y_JBTD), state, jax.tree.map(lambda a: a.mean(axis=0), aux)

    def _one_segment(self, x_BTD: Array, state: ModelState, segments: Segments) -> tuple[Array, ModelState, dict]:
        """One segment (J = 1 in `segments`) through all layers and the stack's memory."""
        stack, T = self.stack, x_BTD.shape[1]
        if stack is None:
            y_BJTD, state, aux = self._layer_major(x_BTD[:, None], state, segments)
            return y_BJTD[:, 0], state, aux
        valid_BT, axes = segments.valid[:, 0], stack.state_axes()
        before = stop_where(segments.cut, reset_rows(state.stack, segments.reset[:, 0], axes))
        has_tokens_B = valid_BT.any(axis=1)
        begun = begin_rows(reset_rows(before, ~has_tokens_B, axes), stack.start_state(), axes)  # see `SegmentsPort`
        tokens_BTD, decode = x_BTD, functools.partial(self._second_pass, state.groups)
        begun = stack.preview(begun, tokens_BTD, valid_BT, decode)
        rows = [stack.prefix(begun), x_BTD, stack.suffix(begun)]
        if stack.prefix_tokens + stack.suffix_tokens:
            if num_shards("time") > 1:  # uneven shards, on which XLA's partitioner aborts
                raise ValueError(
                    f"join {self.config.join.kind!r} adds memory tokens to a segment, which cannot be sharded along "
                    "its tokens then; set mesh.slots to 1"
                )
            x_BTD = jnp.concatenate([part for part in rows if part is not None], axis=1)
            segments = segments._replace(valid=self._seen(stack.prefix_valid(begun), valid_BT)[:, None])
        shared = stack.shared(begun)
        carry, groups, aux = self._through(Carry(x_BTD[:, None], shared), state.groups, Context(segments, shared))
        y_BTD = self.final_norm(carry.x[:, 0])
        end = stack.prefix_tokens + T
        after = stack.update(begun, carry.shared, y_BTD[:, end:], aux)
        after = clear_start(stack.observe(after, tokens_BTD, valid_BT, decode), axes)
        after = select_rows(has_tokens_B, after, before, axes)
        return y_BTD[:, stack.prefix_tokens : end], ModelState(groups, after), aux

    def _second_pass(self, groups: tuple[State, ...], x_BND: Array, valid_BN: Array) -> Array:
        """Rows of a stack's own through all blocks, which have no state then."""
        segment = full_segments((len(x_BND), 1, x_BND.shape[1]), None, valid_BN, None, None)
        carry, _, _ = self._through(Carry(x_BND[:, None], None), groups, Context(segment, None))
        return self.final_norm(carry.x[:, 0])

    def _seen(self, prefix_BN: Array | None, valid_BT: Array) -> Array:
        """Which rows of a segment may be seen, those that the stack adds included."""
        before, after = self._added
        seen_BN = jnp.pad(valid_BT, ((0, 0), (before, after)), constant_values=True)
        return seen_BN if prefix_BN is None else seen_BN.at[:, :before].set(prefix_BN)

    def open(self, state: ModelState, batch: int) -> StreamState:
        """Begins a segment that arrives in pieces, for `batch` rows.

        Raises:
          ValueError: a state of another model or of other rows, or a model whose tokens see later ones.
        """
        self._check_state(batch, state)
        if self.config.join.looks_ahead:
            raise ValueError(
                f"join {self.config.join.kind!r} as configured reads a part of a segment before it predicts it, so it "
                "takes no text in pieces; set model.join.summary='before'"
            )
        (before, after), T, c = self._added, self.config.segment_tokens, self.config
        tokens, kept = before + T + after, None
        if self.stack is not None and self.stack.observes:
            kept = jnp.zeros((batch, T, c.decoder.width), jnp.dtype(c.precision.compute))
        buffers = [stack_layers(block.init_buffers(batch, tokens), n) for block, n in self._unbound()]
        return self._begin_segment(jnp.zeros(batch, jnp.int32), state, buffers, kept)

    def _begin_segment(
        self, position_B: Array, state: ModelState, buffers: list[Buffers], kept: Array | None
    ) -> StreamState:
        """An open segment without tokens but a prefix."""
        begun, shared = self._stack_start(state)
        groups = tuple(
            group.open(None, group_state, space, shared)[1]
            for group, group_state, space in zip(self.groups, state.groups, buffers, strict=True)
        )
        stream = StreamState(position_B, state, groups, kept)
        rows_BND = None if self.stack is None else self.stack.prefix(begun)
        return stream if rows_BND is None else self._add(rows_BND, stream, 0)[1]

    def extend(
        self, tokens: Int[Array, "B S"], count: Int[Array, " B"], stream: StreamState
    ) -> tuple[Float[Array, "B S D"], StreamState]:
        """Feeds the first `count` of S tokens to each row; none may cross the segment's end.

        Args:
          tokens: at most T per row.
          count: how many of them each row takes.
          stream: the open segment.
        Returns:
          Hidden states as the head takes them, meaningless after `count`, and the segment with these tokens.
        """
        T, (before, after) = self.config.segment_tokens, self._added
        position_BS = stream.position[:, None] + jnp.arange(tokens.shape[1])[None]
        valid_BS = jnp.arange(tokens.shape[1])[None] < count[:, None]
        slot_BS = jnp.where(valid_BS, position_BS + before, before + T + after)
        token_BS, x_BSD = jnp.where(valid_BS, position_BS, T), self.embed(tokens)
        if stream.kept is not None:
            rows_B1 = jnp.arange(len(tokens))[:, None]
            stream = stream._replace(kept=stream.kept.at[rows_B1, token_BS].set(x_BSD, mode="drop"))
        place = Place(position_BS + before, slot_BS, token_BS, valid_BS)
        hidden_BSD, stream = self._pieces(x_BSD, stream, place)
        return hidden_BSD, stream._replace(position=stream.position + count)

    def close(self, stream: StreamState, full: Bool[Array, " B"]) -> StreamState:
        """Ends the segment of the rows that are full, and begins their next one."""
        stack, before = self.stack, stream.state
        begun, shared = self._stack_start(before)
        rows_BND, hidden_BND, ended = None if stack is None else stack.suffix(begun), None, stream
        if rows_BND is not None:
            hidden_BND, ended = self._add(rows_BND, stream, self._added[0] + self.config.segment_tokens)
        groups = []
        for group, opened, group_state in zip(self.groups, ended.groups, before.groups, strict=True):
            shared, group_state = group.close(shared, opened, group_state)
            groups.append(group_state)
        after = before.stack
        if stack is not None:
            after = stack.update(begun, shared, hidden_BND, {})
            if stream.kept is not None:
                decode = functools.partial(self._second_pass, before.groups)
                after = stack.observe(after, stream.kept, jnp.ones(stream.kept.shape[:2], bool), decode)
            after = clear_start(after, stack.state_axes())
        state = select_rows(full, ModelState(tuple(groups), after), before, self.state_axes())
        # Buffers are reused: causality hides what an older segment left in them.
        position_B, buffers = jnp.where(full, 0, stream.position), [g.buffers for g in stream.groups]
        begin = self._begin_segment(position_B, state, buffers, stream.kept)
        # Every array of an open layer has the layers axis first and the batch next.
        chosen = jax.tree.map(
            lambda new, old: jnp.where(full.reshape(1, -1, *[1] * (old.ndim - 2)), new, old),
            begin.groups,
            stream.groups,
        )
        return begin._replace(groups=chosen)

    def _stack_start(self, state: ModelState) -> tuple[State, State]:
        """The stack's memory with its start, and what blocks share of it."""
        if self.stack is None:
            return None, None
        begun = begin_rows(state.stack, self.stack.start_state(), self.stack.state_axes())
        return begun, self.stack.shared(begun)

    @property
    def _added(self) -> tuple[int, int]:
        """Rows that the stack adds before and after a segment."""
        return (0, 0) if self.stack is None else (self.stack.prefix_tokens, self.stack.suffix_tokens)

    def _add(self, rows_BND: Array, stream: StreamState, first: int) -> tuple[Array, StreamState]:
        """A stack's rows at positions `first` and on; no memory of a block takes them."""
        position_BN = jnp.broadcast_to(first + jnp.arange(rows_BND.shape[1]), rows_BND.shape[:2])
        none_BN = jnp.zeros(rows_BND.shape[:2], bool)
        return self._pieces(
            rows_BND,
            stream,
            Place(position_BN, position_BN, jnp.full_like(position_BN, self.config.segment_tokens), none_BN),
        )

    def _pieces(self, x_BSD: Array, stream: StreamState, place: Place) -> tuple[Array, StreamState]:
        """New tokens through all blocks of the open segment."""
        if self.stack is not None:
            prefix_BN = self.stack.prefix_valid(self._stack_start(stream.state)[0])
            if prefix_BN is not None:
                tokens_BT = jnp.ones((len(x_BSD), self.config.segment_tokens), bool)
                place = place._replace(seen=self._seen(prefix_BN, tokens_BT))
        if self.positions is not None:
            cache, position_BS = first_cache(stream.state.groups), place.position
            if cache is not None:
                position_BS = position_BS + cache.used_segments[:, None] * self.config.segment_tokens
            x_BSD = x_BSD + self.positions(position_BS)
        groups = []
        for group, opened, state in zip(self.groups, stream.groups, stream.state.groups, strict=True):
            x_BSD, opened = group.extend(x_BSD, opened, state, place)
            groups.append(opened)
        return self.final_norm(x_BSD), stream._replace(groups=tuple(groups))
