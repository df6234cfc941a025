"""Titans' neural memory: weights that are trained at test time, with momentum and forgetting (arXiv:2501.00663)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lm2_jax.layers import Einsum, RMSNorm, Vector, named
from lm2_jax.memory.base import Capability, Memory, MemoryConfig, Metrics, TokenInputs, record, sum_of_changes
from lm2_jax.memory.projections import ConvProjection, HeadGate, InnerNorm
from lm2_jax.ops.ttt_chunk.chunk import ChunkInputs, ChunkSpec, FastWeights, Network, Rates
from lm2_jax.ops.ttt_chunk.networks import InnerLoss, InnerNetwork, MlpNetwork, SquaredError, Weights
from lm2_jax.ops.ttt_chunk.sharded import read_frozen, segment_metrics, ttt_chunk
from lm2_jax.ops.ttt_chunk.step import PartialChunk, empty_chunk, ttt_step
from lm2_jax.parameters import Role
from lm2_jax.precision import Precision, at_least_float32
from lm2_jax.types import Array, Bool, Float

OUTPUT_GATES = {"sigmoid": jax.nn.sigmoid, "silu": jax.nn.silu, "gelu": jax.nn.gelu}


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The step size theta of the inner gradient descent, maximum * sigmoid(x w + b) per head."""

    per: Literal["token", "chunk", "fixed"] = "token"
    """What has a step size of its own: each token, each chunk (by its first token), or nothing: always the maximum."""
    maximum: float = 0.1
    """Largest step, for a sum of squares and keys of length 1."""
    bias: float = -3.0
    """Initial logit. A chunk's steps add up, and momentum adds them again: where chunk_tokens * step / (1 - momentum)
    is well above 1 and keys are alike, training at test time diverges; -3 starts at 0.6 with a chunk of 16."""
    by_place: bool = False
    """Whether a read also scales all steps of its chunk by max(0, 1/t + learned_t) at the chunk's token t (TTT)."""


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """Momentum e or forgetting alpha, sigmoid(x w + b) per head; the paper leaves the biases open."""

    per: Literal["token", "chunk", "off"] = "token"
    """What has a gate of its own: each token, each chunk (by its first token), or nothing: there is no such term."""
    bias: float = 0.0
    """Initial logit."""


@dataclasses.dataclass(frozen=True)
class TitansConfig(MemoryConfig):
    """A small network per head whose weights are the memory; TTT is the same without momentum and forgetting."""

    kind: ClassVar[str] = "titans"
    num_heads: int = 4
    """Heads H, each with a memory of its own of width D/H."""
    chunk_tokens: int = 16
    """Tokens C whose gradients are taken at the same weights; part of the function, and divides a segment."""
    network: InnerNetwork = MlpNetwork()
    """What is trained at test time."""
    loss: InnerLoss = SquaredError()
    """On what."""
    step: StepConfig = StepConfig()
    """Step size theta."""
    momentum: GateConfig = GateConfig(bias=2.0)
    """Share e of the last surprise that is kept."""
    forget: GateConfig = GateConfig(bias=-6.0)
    """Share alpha of the weights that is lost at each token; -6 halves them in 280 tokens, -4 would in 38."""
    conv_tokens: int = 4
    """Taps of the causal convolution after each of the projections q, k and v; 0: none."""
    silu: bool = True
    """Whether q, k and v go through SiLU."""
    unit_keys: bool = True
    """Whether q and k have length 1; else weights can grow without bound."""
    output_norm: bool = True
    """Whether what was found is normalised, per head."""
    output_gate: Literal["sigmoid", "silu", "gelu", "none"] = "sigmoid"
    """What is made of a projection of the token and multiplies what was found."""
    start_scale: float = 1.0
    """Initial standard deviation of the learned start weights, times the root of a layer's inputs."""
    narrow_state: bool = False
    """Whether weights between segments may have a type narrower than float32, if precision.state is one."""
    remat: Literal["none", "chunks", "groups"] = "groups"
    """What the backward pass keeps: everything, each chunk's weights, or those of about the root of all chunks."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"memory.{name} must be at least 1, got {getattr(self, name)}")
        if self.conv_tokens < 0:
            raise ValueError(f"memory.conv_tokens must not be negative, got {self.conv_tokens}")
        if self.step.maximum <= 0:
            raise ValueError(f"memory.step.maximum must be positive, got {self.step.maximum}")

    def build(self, width: int, precision: Precision, **linen: Any) -> "Titans":
        """The module for a decoder of this width."""
        if width % self.num_heads:
            raise ValueError(f"decoder.width={width} is not a multiple of memory.num_heads={self.num_heads}")
        return Titans(self, width, precision, **linen)

    @property
    def capabilities(self) -> Capability:
        """Each token asks the weights after itself; a read asks those of the segment's start."""
        return Capability.READ | Capability.RUNNING | Capability.MERGE

    def check_segment(self, segment_tokens: int) -> None:
        """Chunks must not cross a segment border, or decoding would not give what training gave."""
        if segment_tokens % self.chunk_tokens:
            raise ValueError(
                f"memory.chunk_tokens={self.chunk_tokens} must divide the segment of {segment_tokens} tokens; "
                "change it or model.segment_tokens"
            )

    @property
    def spec(self) -> ChunkSpec:
        """The update of a chunk."""
        held = (self.step.per == "chunk", self.momentum.per == "chunk", self.forget.per == "chunk")
        return ChunkSpec(Network(self.network), self.loss, self.chunk_tokens, held)


class TitansState(NamedTuple):
    """The memory between two segments."""

    weights: Weights  # [B H I O] per layer
    momentum: Weights | None
    tails: tuple[Array, Array, Array] | None  # [B W H K]: the last inputs of the convolutions of q, k and v
    is_start: Bool[Array, " B"]


class OpenTitans(NamedTuple):
    """The memory inside a segment."""

    fast: FastWeights  # at the start of each row's unfinished chunk
    chunk: PartialChunk  # that chunk
    tails: tuple[Array, Array, Array] | None  # as in the state, after the tokens so far


class TitansReader(NamedTuple):
    """The memory at a segment's start, for reads."""

    weights: Weights
    tail: Float[Array, "B W H K"] | None  # the last inputs of the queries' convolution, which begins anew in a segment


class Titans(Memory):
    """H networks f(x; W) trained at test time to answer keys with values.

        S_t = e_t S_{t-1} - theta_t dl/dW,   l = |f(k_t; W) - v_t|^2,
        W_t = (1 - alpha_t) W_{t-1} + S_t,   y_t = f(q_t; W_t)

    (equations 11-15; gradients at the weights before the token's chunk, equation 16). `read` asks the weights at the
    segment's start, a running call those after each token, its own included. q, k and v are projections, then a
    causal convolution, SiLU, and for q and k a norm (section 4.4). Start weights are learned; momentum starts at 0.

    Differs from the paper where it is silent or slips: theta, e and alpha are sigmoids, theta with a maximum; a
    memory per head; gates per head and not per channel. See `lm2_jax.ops.ttt_chunk.chunk` for how a chunk is computed.
    """

    config: TitansConfig
    width: int
    precision: Precision

    def setup(self) -> None:
        c, D, H, K, precision = self.config, self.width, self.config.num_heads, self.head_width, self.precision
        self.q, self.k = (ConvProjection(D, H, precision, c.conv_tokens, c.silu, c.unit_keys) for _ in range(2))
        self.v = ConvProjection(D, H, precision, c.conv_tokens, c.silu, is_unit=False)
        if c.step.per != "fixed":
            self.gate_step = HeadGate(D, H, precision, c.step.bias)
        if c.step.by_place:
            self.place = Vector((c.chunk_tokens,), ("chunk",), precision)
        if c.momentum.per != "off":
            self.gate_momentum = HeadGate(D, H, precision, c.momentum.bias)
        if c.forget.per != "off":
            self.gate_forget = HeadGate(D, H, precision, c.forget.bias)
        if c.network.has_norm:
            self.inner_norm = InnerNorm(H, K, precision)
        self.start = [self._start(i, shape) for i, shape in enumerate(c.network.shapes(K))]
        if c.output_norm:
            self.norm = RMSNorm(precision, axis="head")
        if c.output_gate != "none":
            self.gate_output = Einsum((D, H, K), ("embed", "heads", "head"), precision, role=Role.GATE)
        self.o = Einsum((H, K, D), ("heads", "head", "embed"), precision, in_dims=2)

    @property
    def head_width(self) -> int:
        """Width K of a head's memory."""
        return self.width // self.config.num_heads

    @property
    def _weight_axes(self) -> tuple[tuple[str, ...], ...]:
        """Logical axes of [B H I O], layer by layer."""
        return tuple(("batch", "heads", *axes) for axes in self.config.network.axes())

    @property
    def inner_dtype(self) -> jnp.dtype:
        """Type of all that happens inside the memory."""
        return jnp.promote_types(at_least_float32(self.precision.compute), at_least_float32(self.precision.state))

    def _start(self, layer: int, shape: tuple[int, int]) -> Float[Array, "H _ _"]:
        """Learned start weights of one layer; biases start at 0."""
        scale, bias = self.config.start_scale, int(self.config.network.has_bias)

        def init(key: Array, full: tuple[int, ...], dtype: jnp.dtype) -> Array:
            w_HIO = jax.random.normal(key, (full[0], *shape), dtype) * (scale * shape[0] ** -0.5)
            return jnp.pad(w_HIO, ((0, 0), (0, bias), (0, 0)))

        full = (self.config.num_heads, shape[0] + bias, shape[1])
        return self.param(
            f"start_{layer}",
            named(init, self._weight_axes[layer][1:], Role.START),
            full,
            jnp.dtype(self.precision.params),
        )

    def init_state(self, batch: int) -> TitansState:
        """Fresh rows."""
        c, K = self.config, self.head_width
        dtype = jnp.dtype(self.precision.state)
        dtype = dtype if c.narrow_state else at_least_float32(dtype)
        bias = int(c.network.has_bias)
        weights = tuple(jnp.zeros((batch, c.num_heads, i + bias, o), dtype) for i, o in c.network.shapes(K))
        momentum, tail = None if c.momentum.per == "off" else weights, self._no_tail(batch)
        return TitansState(weights, momentum, None if tail is None else (tail, tail, tail), jnp.ones(batch, bool))

    def state_axes(self) -> TitansState:
        """Heads are an axis of their own, so that a head's memory never leaves its device."""
        c, tail = self.config, ("batch", "window", "heads", "head")
        weights = self._weight_axes
        momentum = None if c.momentum.per == "off" else weights
        tails = (tail, tail, tail) if c.conv_tokens > 1 else None
        return TitansState(weights, momentum, tails, ("batch",))  # pyright: ignore[reportArgumentType]

    def start_state(self) -> TitansState:
        """Learned weights, no momentum."""
        state = self.init_state(1)
        return state._replace(
            weights=tuple(w[None].astype(h.dtype) for w, h in zip(self.start, state.weights, strict=True))
        )

    def _norm_weights(self) -> Any:
        return self.inner_norm(self.inner_dtype) if self.config.network.has_norm else None

    def _rates(self, x_BTD: Array) -> Rates:
        """theta, log e and log(1 - alpha) of each token, [B T H]."""
        c, dtype = self.config, self.inner_dtype
        if c.step.per == "fixed":
            step = jnp.full((*x_BTD.shape[:2], c.num_heads), c.step.maximum, dtype)
        else:
            step = c.step.maximum * jax.nn.sigmoid(self.gate_step(x_BTD)).astype(dtype)
        momentum = None if c.momentum.per == "off" else jax.nn.log_sigmoid(self.gate_momentum(x_BTD)).astype(dtype)
        keep = None if c.forget.per == "off" else jax.nn.log_sigmoid(-self.gate_forget(x_BTD)).astype(dtype)
        return Rates(step, momentum, keep)

    def _place_scale(self) -> Float[Array, " C"] | None:
        """max(0, 1/t + learned_t), t from 1 (TTT, arXiv:2407.04620, released code)."""
        if not self.config.step.by_place:
            return None
        learned_C = self.place().astype(self.inner_dtype)
        return jnp.maximum(1 / jnp.arange(1, learned_C.shape[0] + 1, dtype=self.inner_dtype) + learned_C, 0)

    def _answer(self, y_BTHK: Float[Array, "B T H K"], x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What was found, normalised, gated by the token, and projected."""
        y_BTHK = self.norm(y_BTHK) if self.config.output_norm else y_BTHK.astype(jnp.dtype(self.precision.compute))
        if self.config.output_gate != "none":
            y_BTHK = y_BTHK * OUTPUT_GATES[self.config.output_gate](self.gate_output("btd,dhk->bthk", x_BTD))
        return self.o("bthk,hkd->btd", y_BTHK)

    def reader(self, state: TitansState) -> TitansReader:
        """Weights at the segment's start."""
        tail = self._no_tail(state.is_start.shape[0])
        return TitansReader(tuple(w.astype(self.inner_dtype) for w in state.weights), tail)

    def read(
        self,
        q_BTD: Float[Array, "B T D"],
        valid_BT: Bool[Array, "B T"],
        reader: TitansReader,
        metrics: Metrics | None = None,
    ) -> tuple[Float[Array, "B T D"], TitansReader]:
        """f(q_t; W), all tokens at the weights of the segment's start; see `Memory.read`."""
        q_BTHK = self.q(q_BTD, reader.tail, valid_BT, self.inner_dtype)
        y_BTHK = read_frozen(self.config.spec.network, self._norm_weights(), reader.weights, q_BTHK)
        tail = self.q.tail(q_BTD, reader.tail, valid_BT)
        return self._answer(y_BTHK, q_BTD), reader._replace(tail=tail)

    def _no_tail(self, batch: int) -> Float[Array, "B W H K"] | None:
        """The inputs of a convolution before a text's first token; None where it reaches back to none."""
        if self.config.conv_tokens < 2:
            return None
        shape = (batch, self.config.conv_tokens - 1, self.config.num_heads, self.head_width)
        return jnp.zeros(shape, jnp.dtype(self.precision.compute))

    def advance(
        self, inputs: TokenInputs, state: OpenTitans, metrics: Metrics | None = None
    ) -> tuple[Float[Array, "B T D"], OpenTitans]:
        """f(q_t; W_t): each token asks the weights after itself; see `Memory.advance`."""
        y_BTHK, state = self._update(inputs, state, metrics, reads=True)
        assert y_BTHK is not None
        return self._answer(y_BTHK, inputs.x), state

    def absorb(self, inputs: TokenInputs, state: OpenTitans, metrics: Metrics | None = None) -> OpenTitans:
        """`advance` without queries."""
        return self._update(inputs, state, metrics, reads=False)[1]

    def _update(
        self, inputs: TokenInputs, state: OpenTitans, metrics: Metrics | None, *, reads: bool
    ) -> tuple[Array | None, OpenTitans]:
        """Trains on T tokens; with `reads`, the answers [B T H K] to their own queries too.

        A full segment runs chunk by chunk; a piece fills the unfinished chunk of each row. Both give the same.
        """
        x_BTD, valid_BT = inputs.x, inputs.valid
        tokens = self._tokens(x_BTD, state.tails, valid_BT, reads=reads)
        spec, norm, scale_C = self.config.spec, self._norm_weights(), self._place_scale()
        tails = self._tails(x_BTD, state.tails, valid_BT)
        if inputs.position is None:
            fast, y_BTHK, measured = ttt_chunk(spec, norm, scale_C, state.fast, tokens, self.config.remat)
            if metrics is not None:
                record(metrics, **segment_metrics(spec, norm, fast, tokens, measured))
            return y_BTHK, state._replace(fast=fast, tails=tails)
        y_BTHK, fast, chunk = ttt_step(spec, norm, scale_C, inputs.position, tokens, state.fast, state.chunk)
        return y_BTHK, OpenTitans(fast, chunk, tails)

    def _tokens(self, x_BTD: Array, tails: Any, valid_BT: Array, *, reads: bool) -> ChunkInputs:
        """Tokens as the memory sees them; with `reads`, their queries too."""
        q_tail, k_tail, v_tail = tails or (None, None, None)
        q_BTHK = self.q(x_BTD, q_tail, valid_BT, self.inner_dtype) if reads else None
        k_BTHK, v_BTHK = (
            stream(x_BTD, tail, valid_BT, self.inner_dtype) for stream, tail in ((self.k, k_tail), (self.v, v_tail))
        )
        return ChunkInputs(q_BTHK, k_BTHK, v_BTHK, self._rates(x_BTD), valid_BT)

    def _tails(self, x_BTD: Array, tails: Any, valid_BT: Array) -> Any:
        """The last valid inputs of the convolutions of q, k and v, for the text that follows."""
        if tails is None:
            return None
        streams = (self.q, self.k, self.v)
        return tuple(stream.tail(x_BTD, old, valid_BT) for stream, old in zip(streams, tails, strict=True))

    def open(self, state: TitansState) -> OpenTitans:
        """Weights and momentum in the dtype of the inner loop, and an empty chunk."""
        fast = FastWeights(*jax.tree.map(lambda w: w.astype(self.inner_dtype), (state.weights, state.momentum)))
        c = self.config
        one = jnp.ones(())
        has = Rates(one, None if c.momentum.per == "off" else one, None if c.forget.per == "off" else one)
        return OpenTitans(fast, empty_chunk(fast, has, c.chunk_tokens), state.tails)

    def close(self, opened: OpenTitans, state: TitansState) -> TitansState:
        """Weights and momentum in the state's dtypes: chunks divide a segment, so the last one is full."""
        held = jax.tree.map(
            lambda new, old: new.astype(old.dtype), opened.fast, FastWeights(state.weights, state.momentum)
        )
        return TitansState(held.weights, held.momentum, opened.tails, state.is_start)

    def merged(self, states: Sequence[TitansState], start: TitansState) -> TitansState:
        """Weights as task vectors, W = W_0 + sum_i (W_i - W_0) (arXiv:2212.04089); the same for the momentum.

        The momentum holds surprise that the weights have not taken up yet. Its sum loses none of it: without forgetting
        and with equal momentum gates, later tokens move the merged weights by the sum of what they would have added to
        each text's weights. Convolutions continue the last text. Forgetting shrinks W_0 too, and that change is counted
        once per text, so the sum has a meaning only for texts that are short next to what forgetting keeps. See
        `Memory.merged`.
        """

        def added(begin: Array, *leaves: Array) -> Array:
            return sum_of_changes(leaves, begin)

        weights = jax.tree.map(added, start.weights, *(state.weights for state in states))
        momentum = jax.tree.map(added, start.momentum, *(state.momentum for state in states))
        return states[-1]._replace(weights=weights, momentum=momentum)
