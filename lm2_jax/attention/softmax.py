"""Softmax attention as a function of queries, keys and values."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lm2_jax.partition import Shards, logical_shard_map
from lm2_jax.precision import at_least_float32
from lm2_jax.types import Array, Bool, Float


class ExtraKV(NamedTuple):
    """Rotated keys and values of rows that are not tokens of the segment."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G K"]


def dot_product_attention(
    q: Float[Array, "R T H K"],
    k: Float[Array, "R S G K"],
    v: Float[Array, "R S G K"],
    mask: Bool[Array, "R 1 #T S"],
    causal: bool = False,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> Float[Array, "R T H K"]:
    """softmax(q k^T / sqrt(K)) v over the keys that the mask allows, with grouped heads.

    `jax.nn.dot_product_attention`, except in float64: there it would compute the softmax in float32.
    """
    if q.dtype != jnp.float64:
        with jax.numpy_dtype_promotion("standard"):  # it mixes bfloat16 with float32
            return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation=implementation)
    R, T, H, K = q.shape
    S, G = k.shape[1:3]
    if causal:
        mask = mask & jnp.tril(jnp.ones((T, S), bool))[None, None]
    score = jnp.einsum("rtgnk,rsgk->rgnts", q.reshape(R, T, G, H // G, K), k) / math.sqrt(K)
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], score, jnp.finfo(q.dtype).min), axis=-1)
    return jnp.einsum("rgnts,rsgk->rtgnk", weights, v).reshape(q.shape)


def attend_from_end(
    q_BNHK: Float[Array, "B N H K"], tokens: ExtraKV, valid_BT: Bool[Array, "B T"], rows: ExtraKV | None
) -> Float[Array, "B N H K"]:
    """Slots after the end of a segment attend to its valid tokens and to each other, in one softmax.

    Where slots and tokens are sharded, the keys and values of each shard are passed around a ring, so that no shard
    ever holds all of them (ring attention, arXiv:2310.01889).

    Args:
      q_BNHK: queries of the slots.
      tokens: keys and values of the segment.
      valid_BT: true for tokens, false for padding.
      rows: keys and values of the slots; None: slots do not see each other.
    """
    rows_axes = ("batch", "slots", "kv_heads", "head")
    tokens_axes, q_axes = ("batch", "time", "kv_heads", "head"), ("batch", "slots", "heads", "head")
    in_axes = (q_axes, ExtraKV(tokens_axes, tokens_axes), ("batch", "time"))  # pyright: ignore[reportArgumentType]
    if rows is None:
        return logical_shard_map(_attend_pool, in_axes, q_axes)(q_BNHK, tokens, valid_BT)
    in_axes = (*in_axes, ExtraKV(rows_axes, rows_axes))  # pyright: ignore[reportArgumentType]
    return logical_shard_map(_attend_pool, in_axes, q_axes)(q_BNHK, tokens, valid_BT, rows)


def _attend_pool(
    shards: Shards, q_BNHK: Array, tokens: ExtraKV, valid_BT: Array, rows: ExtraKV | None = None
) -> Float[Array, "B N H K"]:
    """Attention to the keys of all shards."""
    keys, seen_BS = tokens, valid_BT
    if rows is not None:
        keys = ExtraKV(*(jnp.concatenate(pair, axis=1) for pair in zip(tokens, rows, strict=True)))
        seen_BS = jnp.pad(valid_BT, ((0, 0), (0, rows.k.shape[1])), constant_values=True)
    if shards.size == 1:
        return dot_product_attention(q_BNHK, keys.k, keys.v, seen_BS[:, None, None, :])
    y_BNHK, norm_BNH = _attend_part(q_BNHK, keys, seen_BS)
    for _ in range(shards.size - 1):
        keys, seen_BS = shards.ring_permute((keys, seen_BS))
        part_BNHK, part_norm_BNH = _attend_part(q_BNHK, keys, seen_BS)
        total_BNH = jnp.logaddexp(norm_BNH, part_norm_BNH)
        y_BNHK = y_BNHK * jnp.exp(norm_BNH - total_BNH)[..., None]
        y_BNHK = y_BNHK + part_BNHK * jnp.exp(part_norm_BNH - total_BNH)[..., None]
        norm_BNH = total_BNH
    return y_BNHK.astype(q_BNHK.dtype)


@jax.checkpoint
def _attend_part(
    q_BNHK: Float[Array, "B N H K"], keys: ExtraKV, seen_BS: Bool[Array, "B S"]
) -> tuple[Float[Array, "B N H K"], Float[Array, "B N H"]]:
    """softmax over some of the keys, and the log of its denominator; both in float32 at least."""
    (B, N, H, K), G, wide = q_BNHK.shape, keys.k.shape[2], at_least_float32(q_BNHK.dtype)
    q_BNGRK = q_BNHK.reshape(B, N, G, H // G, K)
    score_BNGRS = jnp.einsum("bngrk,bsgk->bngrs", q_BNGRK, keys.k, preferred_element_type=wide) / math.sqrt(K)
    # Far below any score, but not so far that a shard of padding alone would divide infinities.
    score_BNGRS = jnp.where(seen_BS[:, None, None, None, :], score_BNGRS, jnp.finfo(wide).min / 2)
    norm_BNGR = jax.nn.logsumexp(score_BNGRS, axis=-1)
    weights_BNGRS = jnp.exp(score_BNGRS - norm_BNGR[..., None]).astype(keys.v.dtype)
    y_BNGRK = jnp.einsum("bngrs,bsgk->bngrk", weights_BNGRS, keys.v, preferred_element_type=wide)
    return y_BNGRK.reshape(B, N, H, K), norm_BNGR.reshape(B, N, H)
