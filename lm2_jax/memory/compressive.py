"""Infini-attention's compressive memory (arXiv:2404.07143): linear attention over past segments, inside the heads.

Per head, with sigma(x) = elu(x) + 1, the queries, keys and values of attention before RoPE, M [K V] and z [K] zero at a
document's start, a token reads what the segments before its own have left (equation 3):

    y = sigma(q)^T M / (sigma(q) . z + eps)

and a segment is written as a sum over its tokens (equations 4 and 5):

    linear:  M <- M + sum_t sigma(k_t) v_t^T,    z <- z + sum_t sigma(k_t)
    delta:   M <- M + sum_t sigma(k_t) (v_t - sigma(k_t)^T M / (sigma(k_t) . z + eps))^T,    z as above

The paper has no eps; it makes the answer of an empty memory zero. M and z only count relative to each other. They are
kept as means over the tokens of all segments so far, so that they do not grow with the text; eps is added to the mean.
With fewer key/value groups than heads, the heads of a group share M and z.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lm2_jax.decoder import DecoderConfig
from lm2_jax.memory.base import Capability, Memory, MemoryConfig, Metrics, record
from lm2_jax.precision import Precision, at_least_float32
from lm2_jax.types import Array, Bool, Float, Int

EPSILON = 1e-6
EXACT = jax.lax.Precision.HIGHEST  # errors of a product with M would add up over the text


@dataclasses.dataclass(frozen=True)
class CompressiveConfig(MemoryConfig):
    """Infini-attention: a key-value matrix per attention head; joined by `heads`."""

    kind: ClassVar[str] = "compressive"
    also_called: ClassVar[tuple[str, ...]] = ("infini",)
    update: Literal["linear", "delta"] = "delta"
    """What is added for a key: its value, or what the value differs from that the memory holds for the key."""

    @property
    def capabilities(self) -> Capability:
        """Lives inside the heads of attention."""
        return Capability.HEADS | Capability.PACKED | Capability.MERGE

    def build(self, width: int, precision: Precision, **linen: Any) -> "Compressive":
        """The module for one head of this width."""
        return Compressive(self, 1, width, precision, **linen)

    def build_for(self, decoder: DecoderConfig, precision: Precision, **linen: Any) -> "Compressive":
        """The module for the heads of a decoder."""
        return Compressive(self, decoder.num_kv_heads, decoder.head_dim, precision, **linen)


class CompressiveState(NamedTuple):
    """Means over the tokens of all segments so far."""

    matrix: Float[Array, "B G K V"]  # M
    norm: Float[Array, "B G K"]  # z
    segments: Int[Array, " B"]  # how many
    is_start: Bool[Array, " B"]


class Compressive(Memory):
    """No parameters: all projections are attention's."""

    config: CompressiveConfig
    num_groups: int
    head_width: int
    precision: Precision

    @property
    def inner_dtype(self) -> jnp.dtype:
        """float32 at least."""
        return jnp.promote_types(at_least_float32(self.precision.compute), at_least_float32(self.precision.state))

    def init_state(self, batch: int) -> CompressiveState:
        """Zeros."""
        G, K, dtype = self.num_groups, self.head_width, jnp.dtype(self.precision.state)
        matrix, norm = jnp.zeros((batch, G, K, K), dtype), jnp.zeros((batch, G, K), dtype)
        return CompressiveState(matrix, norm, jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool))

    def state_axes(self) -> CompressiveState:
        """A group's matrix is on the device of its keys."""
        return CompressiveState(
            ("batch", "kv_heads", None, None),  # pyright: ignore[reportArgumentType]
            ("batch", "kv_heads", None),  # pyright: ignore[reportArgumentType]
            ("batch",),  # pyright: ignore[reportArgumentType]
            ("batch",),  # pyright: ignore[reportArgumentType]
        )

    def reader(self, state: CompressiveState) -> CompressiveState:
        """M and z in the type of the products."""
        return state._replace(matrix=state.matrix.astype(self.inner_dtype), norm=state.norm.astype(self.inner_dtype))

    def read_heads(self, q_BTHK: Float[Array, "B T H K"], reader: CompressiveState) -> Float[Array, "B T H V"]:
        """What the memory holds for each unrotated query."""
        (B, T, H, K), G = q_BTHK.shape, self.num_groups
        q_BTGRK = _sigma(q_BTHK.astype(self.inner_dtype)).reshape(B, T, G, H // G, K)
        return self._found(q_BTGRK, reader).reshape(B, T, H, K).astype(q_BTHK.dtype)

    def _found(self, feature_BTGRK: Float[Array, "B T G R K"], state: CompressiveState) -> Float[Array, "B T G R V"]:
        """sigma^T M / (sigma . z + eps)."""
        found_BTGRV = jnp.einsum("btgrk,bgkv->btgrv", feature_BTGRK, state.matrix, precision=EXACT)
        total_BTGR = jnp.einsum("btgrk,bgk->btgr", feature_BTGRK, state.norm, precision=EXACT)
        return found_BTGRV / (total_BTGR[..., None] + EPSILON)

    def write_heads(
        self,
        k_BTGK: Float[Array, "B T G K"],
        v_BTGK: Float[Array, "B T G V"],
        valid_BT: Bool[Array, "B T"],
        state: CompressiveState,
        metrics: Metrics | None = None,
    ) -> CompressiveState:
        """Takes the unrotated keys and the values of a full segment."""
        inner, T, before = self.inner_dtype, k_BTGK.shape[1], self.reader(state)
        feature_BTGK = jnp.where(valid_BT[:, :, None, None], _sigma(k_BTGK.astype(inner)), 0)
        new_BTGV = v_BTGK.astype(inner)
        if self.config.update == "delta":
            new_BTGV = new_BTGV - self._found(feature_BTGK[:, :, :, None], before)[:, :, :, 0]
        count_B = state.segments.astype(inner)

        def mean(old: Array, total: Array) -> Array:
            count = count_B.reshape(-1, *[1] * (old.ndim - 1))
            return (count * old + total / T) / (count + 1)

        matrix = mean(before.matrix, jnp.einsum("btgk,btgv->bgkv", feature_BTGK, new_BTGV, precision=EXACT))
        norm = mean(before.norm, feature_BTGK.sum(axis=1))
        record(metrics, state_norm=jnp.linalg.norm(matrix, axis=(2, 3)))
        return state._replace(
            matrix=matrix.astype(state.matrix.dtype), norm=norm.astype(state.norm.dtype), segments=state.segments + 1
        )

    def merged(self, states: Sequence[CompressiveState], start: CompressiveState) -> CompressiveState:
        """The means over the tokens of all texts: sums of M and z, as if no later key were in M yet.

        With `update` 'linear' this is the memory of all texts read in a row. See `Memory.merged`.
        """
        segments_B = sum((state.segments for state in states[1:]), states[0].segments)

        def mean(name: str) -> Array:
            leaves = [getattr(state, name) for state in states]
            count_shape = (-1, *[1] * (leaves[0].ndim - 1))
            total = jnp.zeros(leaves[0].shape, self.inner_dtype)
            for state, leaf in zip(states, leaves, strict=True):
                total = total + state.segments.astype(self.inner_dtype).reshape(count_shape) * leaf
            return (total / segments_B.astype(self.inner_dtype).reshape(count_shape)).astype(leaves[0].dtype)

        return states[-1]._replace(matrix=mean("matrix"), norm=mean("norm"), segments=segments_B)


def _sigma(x: Array) -> Array:
    return jax.nn.elu(x) + 1
