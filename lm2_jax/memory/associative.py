"""ARMT's associative memory (arXiv:2407.04841): per layer a matrix that memory tokens write by the delta rule.

With D the model width, phi a feature map to P = 2 nu d values (DPFP, arXiv:2102.11174), A [P D] and z [P] zero at a
document's start, a token x of a segment reads what the segments before it have written (equation 9):

    y = phi(W_q x)^T A / (z . phi(W_q x) + eps)

and the m memory tokens, as they leave the layer, are written together (equations 4-8): with k_i = phi(W_k m_i),

    v'_i = k_i^T A / (z . k_i + eps),    beta_i = sigmoid(w_b . m_i + b)
    A <- A + sum_i beta_i k_i (W_v m_i - v'_i)^T,    z <- z + sum_i gamma_i k_i
    gamma_i = clip(1 - (z . k_i + eps) / (|k_i|^2 + eps), 0, 1)

gamma keeps z from growing where a key is used again. The paper prints neither the clipping nor eps = 1e-5, and says
nothing of gamma's gradient; here as in its released code gamma is clipped, has no gradient, and is 1 in a document's
first segment.

    r = [relu(x); relu(-x)],    phi(x) = [r * roll(r, 1); ..; r * roll(r, nu)]
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.layers import Einsum, RMSNorm, Vector, named
from lm2_jax.memory.base import Capability, Memory, MemoryConfig, Metrics, record, sum_of_changes
from lm2_jax.parameters import Role
from lm2_jax.precision import Precision, at_least_float32
from lm2_jax.types import Array, Bool, Float

EPSILON = 1e-5
EXACT = jax.lax.Precision.HIGHEST  # errors of a product with A would add up over the text


@dataclasses.dataclass(frozen=True)
class AssociativeConfig(MemoryConfig):
    """ARMT: a key-value matrix per layer, written by memory tokens; joined by `layer_tokens`."""

    kind: ClassVar[str] = "associative"
    also_called: ClassVar[tuple[str, ...]] = ("armt",)
    num_tokens: int = 10
    """Memory tokens m after each segment."""
    key_width: int = 64
    """Width d of keys and queries before the feature map, which makes 2 * num_rolls * d of it."""
    num_rolls: int = 3
    """Products nu of the feature map DPFP."""
    norm: bool = False
    """Whether tokens go through an RMSNorm before all projections, which the paper does not have. Without one, answers
    feed back through the residual stream into keys, whose features grow with the square of it."""
    correction: bool = True
    """Whether z grows by what is new of a key (gamma); otherwise by all of it."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "key_width", "num_rolls"):
            if getattr(self, name) < 1:
                raise ValueError(f"memory.{name} must be at least 1, got {getattr(self, name)}")
        if self.num_rolls >= 2 * self.key_width:
            raise ValueError(
                f"memory.num_rolls={self.num_rolls} must be below 2 * memory.key_width={2 * self.key_width}: features "
                "would repeat"
            )

    @property
    def capabilities(self) -> Capability:
        """Every token reads; memory tokens write."""
        return Capability.LAYER_TOKENS | Capability.MERGE

    @property
    def stack_tokens(self) -> int:
        """m."""
        return self.num_tokens

    def build(self, width: int, precision: Precision, **linen: Any) -> "Associative":
        """The module for a decoder of this width."""
        return Associative(self, width, precision, **linen)


class AssociativeState(NamedTuple):
    """What all segments before have written."""

    matrix: Float[Array, "B P D"]  # A
    norm: Float[Array, "B P"]  # z
    is_start: Bool[Array, " B"]


def dpfp(x: Float[Array, "*lead K"], num_rolls: int) -> Float[Array, "*lead P"]:
    """Deterministic parameter-free projection: 2 nu K products of neighbouring positive and negative parts."""
    parts = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)
    return jnp.concatenate([parts * jnp.roll(parts, shift, axis=-1) for shift in range(1, num_rolls + 1)], axis=-1)


class Associative(Memory):
    """One layer's memory; W_v starts at zero, so that a memory added to a trained decoder changes nothing at first."""

    config: AssociativeConfig
    width: int
    precision: Precision

    def setup(self) -> None:
        D, K = self.width, self.config.key_width
        self.norm = RMSNorm(self.precision) if self.config.norm else None
        self.q, self.k = (Einsum((D, K), ("embed", "head"), self.precision) for _ in range(2))
        self.v = Einsum((D, D), ("embed", "state_embed"), self.precision, scale=0.0)
        gate = named(nn.initializers.normal(D**-0.5), ("state_embed",), Role.GATE)
        self.gate_rate_D = self.param("gate_rate", gate, (D,), jnp.dtype(self.precision.params))
        self.rate_bias = Vector((1,), ("head",), self.precision, role=Role.GATE)

    @property
    def inner_dtype(self) -> jnp.dtype:
        """float32 at least."""
        return jnp.promote_types(at_least_float32(self.precision.compute), at_least_float32(self.precision.state))

    def init_state(self, batch: int) -> AssociativeState:
        """Zeros."""
        P, dtype = 2 * self.config.num_rolls * self.config.key_width, jnp.dtype(self.precision.state)
        return AssociativeState(
            jnp.zeros((batch, P, self.width), dtype), jnp.zeros((batch, P), dtype), jnp.ones(batch, bool)
        )

    def state_axes(self) -> AssociativeState:
        """Split by rows alone: the feature map mixes its inputs, and every token needs all of A."""
        return AssociativeState(("batch", None, "state_embed"), ("batch", None), ("batch",))  # pyright: ignore

    def _normed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def reader(self, state: AssociativeState) -> AssociativeState:
        """A and z in the type of the products."""
        matrix, norm = (a.astype(self.inner_dtype) for a in (state.matrix, state.norm))
        return state._replace(matrix=matrix, norm=norm)

    def _found(self, k_BTP: Float[Array, "B T P"], state: AssociativeState) -> tuple[Array, Array]:
        """What A holds for each key, and z . k + eps."""
        matrix, norm = state.matrix.astype(self.inner_dtype), state.norm.astype(self.inner_dtype)
        total_BT1 = jnp.einsum("btp,bp->bt", k_BTP, norm, precision=EXACT)[:, :, None] + EPSILON
        return jnp.einsum("btp,bpd->btd", k_BTP, matrix, precision=EXACT) / total_BT1, total_BT1

    def look_up(self, x_BTD: Float[Array, "B T D"], reader: AssociativeState) -> Float[Array, "B T D"]:
        """The answer to each token; its own segment is not in the memory."""
        q_BTP = dpfp(self.q("btd,dk->btk", self._normed(x_BTD)).astype(self.inner_dtype), self.config.num_rolls)
        return self._found(q_BTP, reader)[0].astype(x_BTD.dtype)

    def write(
        self,
        x_BTD: Float[Array, "B N D"],
        state: AssociativeState,
        valid_BT: Bool[Array, "B N"],
        metrics: Metrics | None = None,
    ) -> AssociativeState:
        """Takes the memory tokens of a segment, all at once."""
        inner, x_BTD = self.inner_dtype, self._normed(x_BTD)
        k_BNP = dpfp(self.k("btd,dk->btk", x_BTD).astype(inner), self.config.num_rolls)
        v_BND = self.v("btd,de->bte", x_BTD).astype(inner)
        logit_BN1 = jnp.sum(x_BTD.astype(inner) * self.gate_rate_D.astype(inner)[None, None], axis=-1, keepdims=True)
        logit_BN1 = logit_BN1 + self.rate_bias().astype(inner)[None, None]
        rate_BN1 = jnp.where(valid_BT[:, :, None], jax.nn.sigmoid(logit_BN1), 0)
        found_BND, total_BN1 = self._found(k_BNP, state)
        new_BN1 = jnp.ones_like(total_BN1)
        if self.config.correction:
            length_BN1 = jnp.sum(k_BNP * k_BNP, axis=-1, keepdims=True) + EPSILON
            share_BN1 = jax.lax.stop_gradient(jnp.clip(1 - total_BN1 / length_BN1, 0, 1))
            new_BN1 = jnp.where(state.is_start[:, None, None], new_BN1, share_BN1)
        new_BN1 = jnp.where(valid_BT[:, :, None], new_BN1, 0)
        added_BPD = jnp.einsum("bnp,bnd->bpd", k_BNP, rate_BN1 * (v_BND - found_BND), precision=EXACT)
        matrix_BPD = state.matrix.astype(inner) + added_BPD
        norm_BP = state.norm.astype(inner) + jnp.sum(new_BN1 * k_BNP, axis=1)
        record(metrics, rate=rate_BN1, new=new_BN1, state_norm=jnp.linalg.norm(matrix_BPD, axis=(1, 2)))
        return state._replace(matrix=matrix_BPD.astype(state.matrix.dtype), norm=norm_BP.astype(state.norm.dtype))

    def merged(self, states: Sequence[AssociativeState], start: AssociativeState) -> AssociativeState:
        """The sums of A and of z, as if no later key were in A yet; see `Memory.merged`."""
        return states[-1]._replace(
            matrix=sum_of_changes([state.matrix for state in states], start.matrix),
            norm=sum_of_changes([state.norm for state in states], start.norm),
        )
