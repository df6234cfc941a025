"""Gated DeltaNet's memory (arXiv:2412.06464): a matrix per head that forgets and corrects what it holds for a key.

Per head, with decay a_t in (0, 1], rate b_t in (0, 1), unit keys k_t and state S [K V]:

    d_t = b_t (v_t - a_t S_{t-1}^T k_t),   S_t = a_t S_{t-1} + k_t d_t^T,   y_t = S_t^T q_t / sqrt(K)

`recurrent` computes this token by token. `chunked` computes the same function in chunks of C tokens (the WY form): with
D[t, s] = prod_{s<j<=t} a_j, G_t = prod_{j<=t} a_j and S the state before the chunk,

    (I + L) d = b (v - G k S),   L[t, s] = b_t D[t, s] k_t . k_s for s < t,
    y_t sqrt(K) = G_t q_t S + sum_{s<=t} D[t, s] (q_t . k_s) d_s,   S' = G_C S + sum_s D[C, s] k_s d_s^T.

The triangular systems of all chunks are solved at once; only products with S run from chunk to chunk.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.layers import Einsum, RMSNorm, named
from lm2_jax.memory.base import Capability, Memory, MemoryConfig, Metrics, TokenInputs, record, sum_of_changes
from lm2_jax.memory.projections import ConvProjection, HeadGate
from lm2_jax.parameters import Role
from lm2_jax.partition import logical_shard_map, num_shards
from lm2_jax.precision import Precision, at_least_float32
from lm2_jax.types import Array, Bool, Float

EXACT = jax.lax.Precision.HIGHEST  # errors of a product with S would add up over the text


@dataclasses.dataclass(frozen=True)
class GatedDeltaConfig(MemoryConfig):
    """Gated DeltaNet: a key-value matrix per head, written by the delta rule with decay."""

    kind: ClassVar[str] = "gated_delta"
    num_heads: int = 4
    """Heads H, each with a matrix of D/H x D/H."""
    chunk_tokens: int = 64
    """Tokens C that training computes at once; changes the speed and not the function."""
    conv_tokens: int = 4
    """Kernel size of the causal convolution after each of the projections q, k and v; 0: none, and then segments may
    hold several packed documents."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"memory.{name} must be at least 1, got {getattr(self, name)}")
        if self.conv_tokens < 0:
            raise ValueError(f"memory.conv_tokens must not be negative, got {self.conv_tokens}")

    @property
    def capabilities(self) -> Capability:
        """Runs along; a convolution reaches over the border of packed documents."""
        packed = Capability.PACKED if self.conv_tokens < 2 else Capability.NONE
        return Capability.READ | Capability.RUNNING | Capability.SHAREABLE | Capability.MERGE | packed

    def build(self, width: int, precision: Precision, **linen: Any) -> "GatedDelta":
        """The module for a decoder of this width."""
        if width % self.num_heads:
            raise ValueError(f"decoder.width={width} is not a multiple of memory.num_heads={self.num_heads}")
        return GatedDelta(self, width, precision, **linen)


class Delta(NamedTuple):
    """Tokens as the delta rule takes them; padding has rate 0 and decay 1."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]  # of length 1
    v: Float[Array, "B T H V"]
    log_decay: Float[Array, "B T H"]
    rate: Float[Array, "B T H"]
    reset: Bool[Array, "B T"]  # the state is zero before this token


def recurrent(tokens: Delta, state: Float[Array, "B H K V"]) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The definition, token by token.

    Args:
      tokens: any number T.
      state: before them.
    Returns:
      y, and the state after the tokens.
    """

    def step(s_BHKV: Array, token: Delta) -> tuple[Array, Array]:
        keep_BH = jnp.where(token.reset[:, None], 0, jnp.exp(token.log_decay))
        s_BHKV = s_BHKV * keep_BH[..., None, None]
        found_BHV = jnp.einsum("bhk,bhkv->bhv", token.k, s_BHKV, precision=EXACT)
        d_BHV = token.rate[..., None] * (token.v - found_BHV)
        s_BHKV = s_BHKV + token.k[..., None] * d_BHV[..., None, :]
        return s_BHKV, jnp.einsum("bhk,bhkv->bhv", token.q, s_BHKV, precision=EXACT)

    state, y_TBHV = jax.lax.scan(step, state, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tokens))
    return jnp.moveaxis(y_TBHV, 0, 1) / math.sqrt(tokens.k.shape[-1]), state


def chunked(
    tokens: Delta, state: Float[Array, "B H K V"], chunk_tokens: int
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The same as `recurrent` in matrix products; see the module's docstring.

    Args:
      tokens: any number T; the last chunk may be shorter.
      state: before them.
      chunk_tokens: C.
    """
    B, T, H, K = tokens.k.shape
    C = min(chunk_tokens, T)
    J = -(-T // C)

    def to_chunks(a: Array) -> Array:
        """[B T H ..] as [J B H C ..]; zeros at the end are padding."""
        a = jnp.pad(a, ((0, 0), (0, J * C - T), *[(0, 0)] * (a.ndim - 2)))
        return jnp.moveaxis(a.reshape(B, J, C, *a.shape[2:]), (1, 3), (0, 2))

    reset = jnp.broadcast_to(tokens.reset[:, :, None], (B, T, H))
    q, k, v, log_decay, rate, reset = (to_chunks(a) for a in tokens._replace(reset=reset))
    document = jnp.cumsum(reset, axis=-1)  # within the chunk; 0 continues the chunk before
    place = jnp.arange(C)
    later, upto = place[:, None] > place[None, :], place[:, None] >= place[None, :]
    upto = upto[None, None, None] & (document[..., :, None] == document[..., None, :])
    # Sums over the factors of each entry alone: differences of one running sum would lose digits.
    total = jnp.cumsum(jnp.where(later[None, None, None], log_decay[..., :, None], 0), axis=-2)
    D = jnp.where(upto, jnp.exp(total), 0)
    G = jnp.where(document == 0, jnp.exp(jnp.cumsum(log_decay, axis=-1)), 0)[..., None]
    L = jnp.tril(rate[..., None] * D * jnp.einsum("jbhtk,jbhsk->jbhts", k, k, precision=EXACT), -1)
    given = jnp.concatenate([rate[..., None] * v, rate[..., None] * G * k], axis=-1)
    solved = jax.scipy.linalg.solve_triangular(jnp.eye(C, dtype=L.dtype)[None, None, None] + L, given, lower=True)
    u, w = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    attention = D * jnp.einsum("jbhtk,jbhsk->jbhts", q, k, precision=EXACT)
    kept_k = D[..., -1, :, None] * k

    def step(s_BHKV: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        u, w, attention, q_start, kept_k, keep = chunk
        d = u - jnp.einsum("bhtk,bhkv->bhtv", w, s_BHKV, precision=EXACT)
        y = jnp.einsum("bhtk,bhkv->bhtv", q_start, s_BHKV, precision=EXACT)
        y = y + jnp.einsum("bhts,bhsv->bhtv", attention, d, precision=EXACT)
        return keep[..., None] * s_BHKV + jnp.einsum("bhtk,bhtv->bhkv", kept_k, d, precision=EXACT), y

    state, y_JBHCV = jax.lax.scan(step, state, (u, w, attention, G * q, kept_k, G[..., -1, :]))
    y_BTHV = jnp.moveaxis(y_JBHCV, (0, 3), (1, 2)).reshape(B, J * C, H, -1)[:, :T]
    return y_BTHV / math.sqrt(K), state


class GatedDeltaState(NamedTuple):
    """The memory after any token."""

    matrix: Float[Array, "B H K V"]  # S
    tails: tuple[Array, Array, Array] | None  # [B W H K]: the last inputs of the convolutions of q, k and v
    is_start: Bool[Array, " B"]


class DeltaReader(NamedTuple):
    """The memory at a segment's start, for reads."""

    matrix: Float[Array, "B H K V"]
    tail: Float[Array, "B W H K"] | None


class GatedDelta(Memory):
    """q, k, v through short convolutions and SiLU; y through a norm and a SiLU gate per channel."""

    config: GatedDeltaConfig
    width: int
    precision: Precision

    def setup(self) -> None:
        D, H, K, kernel = self.width, self.config.num_heads, self.head_width, self.config.conv_tokens
        self.q, self.k = (ConvProjection(D, H, self.precision, kernel, True, True) for _ in range(2))
        self.v = ConvProjection(D, H, self.precision, kernel, True, False)
        self.gate_rate = HeadGate(D, H, self.precision)
        self.gate_decay = DecayGate(D, H, self.precision)
        self.norm = RMSNorm(self.precision, axis="head")
        self.gate_output = Einsum((D, H, K), ("embed", "heads", "head"), self.precision, role=Role.GATE)
        self.o = Einsum((H, K, D), ("heads", "head", "embed"), self.precision, in_dims=2)

    @property
    def head_width(self) -> int:
        """Width K = V of a head."""
        return self.width // self.config.num_heads

    @property
    def inner_dtype(self) -> jnp.dtype:
        """float32 at least."""
        return jnp.promote_types(at_least_float32(self.precision.compute), at_least_float32(self.precision.state))

    def init_state(self, batch: int) -> GatedDeltaState:
        """Zeros."""
        H, K, dtype = self.config.num_heads, self.head_width, at_least_float32(self.precision.state)
        tail = self._no_tail(batch)
        tails = None if tail is None else (tail, tail, tail)
        return GatedDeltaState(jnp.zeros((batch, H, K, K), dtype), tails, jnp.ones(batch, bool))

    def state_axes(self) -> GatedDeltaState:
        """Heads are an axis of their own, so that a head's matrix stays on its device."""
        tail = ("batch", "window", "heads", "head")
        tails = (tail, tail, tail) if self.config.conv_tokens > 1 else None
        return GatedDeltaState(("batch", "heads", None, None), tails, ("batch",))  # pyright: ignore

    def _no_tail(self, batch: int) -> Float[Array, "B W H K"] | None:
        """The inputs of a convolution before the first token; None where it reaches back to none."""
        if self.config.conv_tokens < 2:
            return None
        shape = (batch, self.config.conv_tokens - 1, self.config.num_heads, self.head_width)
        return jnp.zeros(shape, jnp.dtype(self.precision.compute))

    def reader(self, state: GatedDeltaState) -> DeltaReader:
        """The matrix at the segment's start."""
        return DeltaReader(state.matrix.astype(self.inner_dtype), self._no_tail(len(state.is_start)))

    def read(
        self,
        q_BTD: Float[Array, "B T D"],
        valid_BT: Bool[Array, "B T"],
        reader: DeltaReader,
        metrics: Metrics | None = None,
    ) -> tuple[Float[Array, "B T D"], DeltaReader]:
        """S^T q_t / sqrt(K), all tokens with the matrix of the segment's start; see `Memory.read`."""
        q_BTHK = self.q(q_BTD, reader.tail, valid_BT, self.inner_dtype)
        y_BTHK = jnp.einsum("bthk,bhkv->bthv", q_BTHK, reader.matrix, precision=EXACT) / math.sqrt(self.head_width)
        return self._output(y_BTHK, q_BTD), reader._replace(tail=self.q.tail(q_BTD, reader.tail, valid_BT))

    def advance(
        self, inputs: TokenInputs, state: GatedDeltaState, metrics: Metrics | None = None
    ) -> tuple[Float[Array, "B T D"], GatedDeltaState]:
        """y_t of each token, and the state after the last; see `Memory.advance`."""
        x_BTD, valid_BT = inputs.x, inputs.valid
        streams, tails = (self.q, self.k, self.v), state.tails or (None, None, None)
        q, k, v = (s(x_BTD, tail, valid_BT, self.inner_dtype) for s, tail in zip(streams, tails, strict=True))
        valid_BT1 = valid_BT[:, :, None]
        rate = jnp.where(valid_BT1, jax.nn.sigmoid(self.gate_rate(x_BTD)), 0).astype(self.inner_dtype)
        log_decay = jnp.where(valid_BT1, self.gate_decay(x_BTD), 0).astype(self.inner_dtype)
        reset_BT = jnp.zeros_like(valid_BT) if inputs.reset is None else inputs.reset
        record(metrics, rate=rate, decay=jnp.exp(log_decay))
        y, matrix = self._run(Delta(q, k, v, log_decay, rate, reset_BT), state.matrix.astype(self.inner_dtype))
        record(metrics, state_norm=jnp.linalg.norm(matrix, axis=(2, 3)))
        if state.tails is not None:
            tails = tuple(s.tail(x_BTD, tail, valid_BT) for s, tail in zip(streams, state.tails, strict=True))
            state = state._replace(tails=tails)
        return self._output(y, x_BTD), state._replace(matrix=matrix.astype(state.matrix.dtype))

    def merged(self, states: Sequence[GatedDeltaState], start: GatedDeltaState) -> GatedDeltaState:
        """The sum of all matrices; convolutions continue the last text.

        This is the matrix of all texts read in a row, if later texts neither decay the earlier ones nor use keys that
        overlap with theirs. See `Memory.merged`.
        """
        return states[-1]._replace(matrix=sum_of_changes([state.matrix for state in states], start.matrix))

    def _run(self, tokens: Delta, matrix: Array) -> tuple[Array, Array]:
        """Each device takes its own rows and heads."""

        def own(_: Any, tokens: Delta, matrix: Array) -> tuple[Array, Array]:
            if tokens.k.shape[1] == 1:
                return recurrent(tokens, matrix)
            return chunked(tokens, matrix, self.config.chunk_tokens)

        of_heads, of_rates, of_state = (
            ("batch", None, "heads", None),
            ("batch", None, "heads"),
            ("batch", "heads", None, None),
        )
        in_axes: Any = (Delta(of_heads, of_heads, of_heads, of_rates, of_rates, ("batch", None)), of_state)  # pyright: ignore
        split = next((name for name in ("heads", "batch") if num_shards(name) > 1), "heads")
        return logical_shard_map(own, in_axes, (of_heads, of_state), reduce=split, check=False)(tokens, matrix)

    def _output(self, y_BTHK: Float[Array, "B T H K"], x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalised per head, gated by the token, and projected."""
        y_BTHK = self.norm(y_BTHK) * nn.silu(self.gate_output("btd,dhk->bthk", x_BTD))
        return self.o("bthk,hkd->btd", y_BTHK)


class DecayGate(nn.Module):
    """log a = -exp(A) softplus(x W + c) per head, initialised as in Mamba-2: exp(A) in 1..16, steps in 0.001..0.1."""

    width: int
    num_heads: int
    precision: Precision

    def setup(self) -> None:
        shape, stored = (self.num_heads,), jnp.dtype(self.precision.params)
        self.w = Einsum((self.width, self.num_heads), ("embed", "heads"), self.precision, role=Role.GATE)
        self.dt_bias = self.param("dt_bias", named(_step_bias, ("heads",), Role.GATE), shape, stored)
        self.A_log = self.param("A_log", named(_log_speed, ("heads",), Role.GATE), shape, stored)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
        """log a, in float32 at least; at most 0."""
        logit = self.w("btd,dh->bth", x_BTD)
        wide = at_least_float32(logit.dtype)
        step = jax.nn.softplus(logit.astype(wide) + self.dt_bias[None, None].astype(wide))
        return -jnp.exp(self.A_log)[None, None].astype(wide) * step


def _log_speed(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, 1, 16))


def _step_bias(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))  # softplus of it is the step
