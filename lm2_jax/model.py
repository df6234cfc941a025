"""The language model: embedding, runs of equal blocks, head; all state explicit."""

from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.attention import Segments
from lm2_jax.blocks.base import Block, Carrier, Carry, Context, OpenLayer, Place, by_segment
from lm2_jax.config import ModelConfig
from lm2_jax.layers import Einsum, Embed, RMSNorm, constrain
from lm2_jax.parameters import Role
from lm2_jax.partition import parts
from lm2_jax.state import reset_rows, select_rows, stack_axes, stack_layers, stop_where
from lm2_jax.types import Array, Bool, Float, Int, State


class ModelState(NamedTuple):
    """Everything that crosses a segment border."""

    runs: tuple[State, ...]  # per run of equal blocks, the layers axis first
    shared: State  # what the join's carrier keeps, or None


class StreamState(NamedTuple):
    """A model inside an unfinished segment; rows may stand at different positions."""

    position: Int[Array, " B"]  # tokens of the open segment so far
    state: ModelState  # at the segment's start
    runs: tuple[OpenLayer, ...]


class Output(NamedTuple):
    """What `forward` returns."""

    hidden: Float[Array, "B S D"]  # normalised, as the head takes it
    logits: Float[Array, "B S V"] | None
    state: ModelState
    aux: dict[str, Array]  # diagnostics by name, one value per layer


class Run(NamedTuple):
    """Consecutive blocks of one kind."""

    first: int
    length: int


def split_runs(config: ModelConfig) -> list[Run]:
    """The blocks as runs of equal ones."""
    runs: list[Run] = []
    for layer in range(config.decoder.num_layers):
        if runs and config.block_of(runs[-1].first) == config.block_of(layer):
            runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
        else:
            runs.append(Run(layer, 1))
    return runs


def check_rows(rows: int, batch: int) -> None:
    """Raises ValueError where a state has other rows than the tokens."""
    if rows != batch:
        raise ValueError(f"state has {rows} rows, tokens have {batch}; make it with init_state(batch={batch})")


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
        self.runs = [self._scanned(run) for run in split_runs(c)]
        self.carrier = c.join.carrier(self.config.block_spec)
        self.final_norm = RMSNorm(c.precision, d.norm_epsilon)
        if not d.tie_head:
            self.head = Einsum((d.width, c.vocab_size), ("row_width", "vocab"), c.precision, role=Role.HEAD)

    def _unbound(self, run: Run) -> Block:
        """A block of the run, to ask it for what needs no parameters."""
        block, spec = self.config.block_of(run.first)
        return block(spec, parent=None)

    def _scanned(self, run: Run) -> Any:
        """One run as a scan over stacked layers; the module's methods keep their meaning for the whole run."""
        block, spec = self.config.block_of(run.first)
        policy = REMAT_POLICIES[self.config.remat]
        if policy is not None:
            block = nn.remat(block, policy=policy, prevent_cse=False, methods=["forward"])
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=run.length,
            metadata_params={nn.PARTITION_NAME: "layers"},
            methods=["forward", "open", "extend", "close"],
        )
        return scanned(spec, name=f"blocks_{run.first}")

    @property
    def _unbound_carrier(self) -> Carrier | None:
        return self.config.join.carrier(self.config.block_spec, parent=None)

    def init_state(self, batch: int) -> ModelState:
        """The state before any text; needs no parameters."""
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        runs = tuple(stack_layers(self._unbound(run).init_state(batch), run.length) for run in split_runs(self.config))
        carrier = self._unbound_carrier
        return ModelState(runs, None if carrier is None else carrier.init_state(batch))

    def state_axes(self) -> ModelState:
        """The logical axes of `init_state`, in the same tree."""
        runs = tuple(stack_axes(self._unbound(run).state_axes()) for run in split_runs(self.config))
        carrier = self._unbound_carrier
        return ModelState(runs, None if carrier is None else carrier.state_axes())

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        state: ModelState,
        reset: Bool[Array, "..."] | None = None,
        valid: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S V"], ModelState]:
        """Logits of K whole segments, S = K*T, and the state behind them; see `forward`."""
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
        """K whole segments.

        Args:
          tokens: K*T of them per row, K >= 1.
          state: before the first segment.
          reset: [B K], the row begins a new document at that segment; or [B], before the first one.
          valid: False is padding; a segment of nothing else leaves its row's state bit-equal.
          document: number of the document within its segment, where documents are packed.
          bptt_segments: gradient flows through blocks of this many segments; None: through all.
          with_logits: whether logits are wanted; the loss works from hidden states.
        Raises:
          ValueError: where shapes do not fit.
        """
        B, S = tokens.shape
        T = self.config.segment_tokens
        if S == 0 or S % T:
            raise ValueError(
                f"tokens must be whole segments of model.segment_tokens={T}, got {S} a row; use lm2_jax.stream"
            )
        self._check_state(B, state)
        J = S // T
        segments = self._segments(B, J, reset, valid, document, bptt_segments)
        x_BJTD = self.embed(tokens.reshape(B, J, T))
        # Each takes its part of the tokens first: in one step, all devices would gather all rows.
        x_BJTD = constrain(x_BJTD, ("copies", "segments", "time", "row_width"))
        x_BJTD = constrain(x_BJTD, ("batch", "segments", "time", "embed"))
        schedule = self._segment_major if self._schedule() == "segment_major" else self._layer_major
        hidden_BJTD, state, aux = schedule(x_BJTD, state, segments)
        hidden_BSD = hidden_BJTD.reshape(B, S, -1)
        return Output(hidden_BSD, self.logits(hidden_BSD) if with_logits else None, state, aux)

    def logits(self, hidden_BSD: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """The head, in the logits' type."""
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
        return "layer_major" if self.carrier is None else "segment_major"

    def _check_state(self, batch: int, state: ModelState) -> None:
        """Refuses what would fail far inside, or be broadcast: a state of another model or of other rows."""
        expected = jax.eval_shape(lambda: self.init_state(batch))
        try:
            chex.assert_trees_all_equal_structs(state, expected)
            axes = jax.tree.structure(expected).flatten_up_to(self.state_axes())
            for leaf, names in zip(jax.tree.leaves(state), axes, strict=True):
                check_rows(leaf.shape[names.index("batch")] if leaf.ndim == len(names) else batch, batch)
            chex.assert_trees_all_equal_shapes(state, expected)
        except AssertionError as error:
            raise ValueError(f"state is not one of this model; make it with init_state. {error}") from error

    def _segments(
        self, B: int, J: int, reset: Array | None, valid: Array | None, document: Array | None, bptt: int | None
    ) -> Segments:
        """Borders and padding as arrays of full shape."""
        T = self.config.segment_tokens
        reset_BJ = jnp.zeros((B, J), bool)
        if reset is not None:
            if reset.shape not in ((B,), (B, J)):
                raise ValueError(f"reset must have shape [B]={[B]} or [B, K]={[B, J]}, got {list(reset.shape)}")
            reset_BJ = reset_BJ.at[:, 0].set(reset) if reset.ndim == 1 else reset
        for name, array in (("valid", valid), ("document", document)):
            if array is not None and array.shape != (B, J * T):
                raise ValueError(f"{name} must have the shape of tokens, {[B, J * T]}, got {list(array.shape)}")
        if document is not None and not self.config.takes_packed:
            raise ValueError(
                f"join {self.config.join.kind!r} takes no packed documents, as its state cannot begin anew inside a "
                "segment; use ordered segments"
            )
        valid_BJT = jnp.ones((B, J, T), bool) if valid is None else valid.reshape(B, J, T)
        segment_J = jnp.arange(J)
        cut_J = jnp.zeros(J, bool) if bptt is None else (segment_J > 0) & (segment_J % bptt == 0)
        return Segments(reset_BJ, cut_J, valid_BJT, None if document is None else document.reshape(B, J, T))

    def _layer_major(self, x_BJTD: Array, state: ModelState, segments: Segments) -> tuple[Array, ModelState, dict]:
        """Layers outside, segments inside: projections and attention are batched over all segments."""
        carry, runs, notes = Carry(x_BJTD, None), [], []
        for run, run_state in zip(self.runs, state.runs, strict=True):
            carry, (run_state, run_notes) = run.forward(carry, run_state, Context(segments, None))
            runs.append(run_state)
            notes.append(run_notes)
        return self.final_norm(carry.x), ModelState(tuple(runs), state.shared), self._aux(notes)

    def _segment_major(self, x_BJTD: Array, state: ModelState, segments: Segments) -> tuple[Array, ModelState, dict]:
        """Segments outside, all layers inside."""

        def body(model: "LanguageModel", state: ModelState, inputs: tuple[Array, Segments]) -> tuple[ModelState, Any]:
            x_BTD, one = inputs
            document = None if one.document is None else one.document[:, None]
            one = Segments(one.reset[:, None], one.cut[None], one.valid[:, None], document)
            y_BTD, state, aux = model._one_segment(x_BTD, state, one)
            return state, (y_BTD, aux)

        document = None if segments.document is None else by_segment(segments.document)
        per_segment = Segments(by_segment(segments.reset), segments.cut, by_segment(segments.valid), document)
        scan = nn.scan(body, variable_broadcast="params", split_rngs={"params": False})
        state, (y_JBTD, aux) = scan(self, state, (by_segment(x_BJTD), per_segment))
        return by_segment(y_JBTD), state, jax.tree.map(lambda a: a.mean(axis=0), aux)

    def _one_segment(self, x_BTD: Array, state: ModelState, segments: Segments) -> tuple[Array, ModelState, dict]:
        """One segment (J = 1 in `segments`) through all layers and the carrier."""
        carrier, shared, T = self.carrier, state.shared, x_BTD.shape[1]
        extra, thread, valid_BT = 0, None, segments.valid[:, 0]
        if carrier is not None:
            shared = stop_where(segments.cut[0], reset_rows(shared, segments.reset[:, 0], carrier.state_axes()))
            extra, thread = carrier.extra_tokens, carrier.thread(shared)
            rows_BND = carrier.tokens(shared)
            if rows_BND is not None:
                if parts("time") > 1:  # uneven parts, on which XLA's partitioner aborts
                    raise ValueError(
                        f"join {self.config.join.kind!r} puts memory tokens beside a segment, which cannot be split "
                        "then; set mesh.slots to 1"
                    )
                x_BTD = jnp.concatenate([rows_BND, x_BTD, rows_BND], axis=1)
                beside = jnp.ones((x_BTD.shape[0], 1, extra), bool)
                segments = segments._replace(valid=jnp.concatenate([beside, segments.valid, beside], axis=2))
        carry, runs, notes = Carry(x_BTD[:, None], thread), [], []
        for run, run_state in zip(self.runs, state.runs, strict=True):
            carry, (run_state, run_notes) = run.forward(carry, run_state, Context(segments, thread))
            runs.append(run_state)
            notes.append(run_notes)
        y_BTD, aux = self.final_norm(carry.x[:, 0]), self._aux(notes)
        if carrier is not None:
            after = carrier.leave(shared, carry.thread, y_BTD[:, T + extra :] if extra else None, aux)
            shared = select_rows(valid_BT.any(axis=1), after, shared, carrier.state_axes())
        return y_BTD[:, extra : extra + T], ModelState(tuple(runs), shared), aux

    def _aux(self, notes: list[dict[str, Array]]) -> dict[str, Array]:
        """Diagnostics of all layers that have them, by name."""
        names = sorted({name for run in notes for name in run})
        return {name: jnp.concatenate([run[name] for run in notes if name in run]) for name in names}

    def open(self, state: ModelState, batch: int) -> StreamState:
        """Begins a segment that arrives in pieces, for `batch` rows; raises ValueError for a state of others."""
        self._check_state(batch, state)
        carrier, extra = self.carrier, self._extra
        span_BT = jnp.zeros((batch, self.config.segment_tokens + 2 * extra))
        thread = None if carrier is None else carrier.thread(state.shared)
        runs = tuple(
            run.open(span_BT, run_state, thread)[1] for run, run_state in zip(self.runs, state.runs, strict=True)
        )
        stream = StreamState(jnp.zeros(batch, jnp.int32), state, runs)
        rows_BND = None if carrier is None else carrier.tokens(state.shared)
        return stream if rows_BND is None else self._beside(rows_BND, stream, 0)[1]

    def extend(
        self, tokens: Int[Array, "B S"], count: Int[Array, " B"], stream: StreamState
    ) -> tuple[Float[Array, "B S D"], StreamState]:
        """Feeds the first `count` of S tokens to each row; none may cross the segment's end.

        Args:
          tokens: at most T per row.
          count: how many of them each row takes.
          stream: the open segment.
        Returns:
          Hidden states as the head takes them, meaningless behind `count`, and the segment with these tokens.
        """
        T, extra = self.config.segment_tokens, self._extra
        step_1S = jnp.arange(tokens.shape[1])[None]
        position_BS = stream.position[:, None] + step_1S
        live_BS = step_1S < count[:, None]
        slot_BS = jnp.where(live_BS, position_BS + extra, T + 2 * extra)
        place = Place(position_BS + extra, slot_BS, jnp.where(live_BS, position_BS, T))
        hidden_BSD, stream = self._through(self.embed(tokens), stream, place)
        return hidden_BSD, stream._replace(position=stream.position + count)

    def close(self, stream: StreamState, full: Bool[Array, " B"]) -> StreamState:
        """Ends the segment of the rows that are full, and begins their next one."""
        carrier, T, extra = self.carrier, self.config.segment_tokens, self._extra
        batch, before = full.shape[0], stream.state
        rows_BND = None if carrier is None else carrier.tokens(before.shared)
        hidden_BND, ended = None, stream
        if rows_BND is not None:
            hidden_BND, ended = self._beside(rows_BND, stream, T + extra)
        thread, runs = None if carrier is None else carrier.thread(before.shared), []
        for run, run_open in zip(self.runs, ended.runs, strict=True):
            thread, run_state = run.close(thread, run_open, None)
            runs.append(run_state)
        shared = None if carrier is None else carrier.leave(before.shared, thread, hidden_BND, {})
        state = select_rows(full, ModelState(tuple(runs), shared), before, self.state_axes())
        opened = self.open(state, batch)
        # Every array of an open layer has the layers axis first and the batch next.
        chosen = jax.tree.map(
            lambda new, old: jnp.where(full.reshape(1, -1, *[1] * (old.ndim - 2)), new, old), opened.runs, stream.runs
        )
        return StreamState(jnp.where(full, 0, stream.position), state, chosen)

    @property
    def _extra(self) -> int:
        return 0 if self.carrier is None else self.carrier.extra_tokens

    def _beside(self, rows_BND: Array, stream: StreamState, first: int) -> tuple[Array, StreamState]:
        """Memory tokens at positions `first` and on; nothing of them is written as text."""
        position_BN = jnp.broadcast_to(first + jnp.arange(rows_BND.shape[1]), rows_BND.shape[:2])
        nowhere_BN = jnp.full_like(position_BN, self.config.segment_tokens)
        return self._through(rows_BND, stream, Place(position_BN, position_BN, nowhere_BN))

    def _through(self, x_BSD: Array, stream: StreamState, place: Place) -> tuple[Array, StreamState]:
        """New tokens through all blocks of the open segment."""
        runs = []
        for run, run_open in zip(self.runs, stream.runs, strict=True):
            x_BSD, run_open = run.extend(x_BSD, run_open, place)
            runs.append(run_open)
        return self.final_norm(x_BSD), stream._replace(runs=tuple(runs))
