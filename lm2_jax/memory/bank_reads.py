"""Attention between tokens and slots, where each device may hold a part of either."""

import functools
import math

import jax
import jax.numpy as jnp

from lm2_jax.attention.softmax import ExtraKV
from lm2_jax.memory.base import Metrics, record
from lm2_jax.partition import Shards, logical_shard_map, num_shards
from lm2_jax.precision import at_least_float32
from lm2_jax.types import Array, Bool, Float

KEY_AXES = ExtraKV(
    k=("batch", "slots", "kv_heads", "head"),  # pyright: ignore[reportArgumentType]
    v=("batch", "slots", "kv_heads", "head"),  # pyright: ignore[reportArgumentType]
)


def slot_weights(
    q_BTHK: Float[Array, "B T H K"],
    k_BNGK: Float[Array, "B N G K"],
    top_k: int | None,
    shards: Shards = Shards(),
) -> Float[Array, "B T H N"]:
    """softmax_n(q k_n / sqrt(K)), outside the k best slots zero; float32 at least (arXiv:2502.06049, section 2.1).

    Args:
      q_BTHK: queries, all of them on each shard.
      k_BNGK: keys of this shard's slots.
      top_k: how many slots of all shards a query sees; None: all.
      shards: over which softmax and the k best are taken.
    """
    B, T, H, K = q_BTHK.shape
    N, G = k_BNGK.shape[1:3]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    wide = at_least_float32(q_BTHK.dtype)
    score_BTGRN = jnp.einsum("btgrk,bngk->btgrn", q_BTGRK, k_BNGK, preferred_element_type=wide) / math.sqrt(K)
    if top_k is not None:
        # The k best of all are among the k best of each shard.
        best = shards.gather(jax.lax.top_k(score_BTGRN, min(top_k, N))[0], 4)
        least = jax.lax.top_k(best, top_k)[0][..., -1:]
        score_BTGRN = jnp.where(score_BTGRN >= least, score_BTGRN, jnp.finfo(wide).min)
    return shards.softmax(score_BTGRN).reshape(B, T, H, N)


def weigh(weights_BTHN: Float[Array, "B T H N"], v_BNGK: Float[Array, "B N G K"]) -> Float[Array, "B T H K"]:
    """Sum over slots, in the values' type."""
    B, T, H, N = weights_BTHN.shape
    G = v_BNGK.shape[2]
    weights_BTGRN = weights_BTHN.astype(v_BNGK.dtype).reshape(B, T, G, H // G, N)
    return jnp.einsum("btgrn,bngk->btgrk", weights_BTGRN, v_BNGK).reshape(B, T, H, -1)


def attend_slots(
    q_BTHK: Float[Array, "B T H K"], keys: ExtraKV, top_k: int | None = None, metrics: Metrics | None = None
) -> Float[Array, "B T H K"]:
    """softmax(Q K^T / sqrt(K)) V over slots, without a mask: the bank holds past segments only.

    Where slots are split, so are the tokens of a segment: each shard gathers the queries, answers them from its own
    slots, and keeps the sum of all answers for its own tokens. No shard ever holds the bank.
    """
    in_parts = q_BTHK.shape[1] % num_shards("time") == 0  # a piece of a stream may be too short; it is not split

    def read(shards: Shards, q_BTHK: Array, keys: ExtraKV) -> tuple[Array, Array]:
        q_BTHK = shards.gather(q_BTHK, 1) if in_parts else q_BTHK
        weights_BTHN = slot_weights(q_BTHK, keys.k, top_k, shards)
        y_BTHK = weigh(weights_BTHN, keys.v)
        return shards.scatter(y_BTHK, 1) if in_parts else shards.sum(y_BTHK), weights_BTHN.mean(axis=1)

    axes = ("batch", "time" if in_parts else None, "heads", "head")
    y_BTHK, usage_BHN = logical_shard_map(read, (axes, KEY_AXES), (axes, ("batch", "heads", "slots")))(q_BTHK, keys)
    if metrics is not None:
        usage_BN = usage_BHN.mean(axis=1)
        entropy_B = -jnp.sum(usage_BN * jnp.log(usage_BN + 1e-9), axis=-1)
        record(metrics, usage_entropy=entropy_B / math.log(max(usage_BN.shape[-1], 2)))
    return y_BTHK


def tokens_to_slots(
    q_BTHK: Float[Array, "B T H K"],
    keys: ExtraKV,
    x_BTHK: Float[Array, "B T H K"],
    valid_BT: Bool[Array, "B T"],
    top_k: int | None,
) -> tuple[Float[Array, "B N H K"], Float[Array, "B N H K"]]:
    """(R E_mem, R E) with R the transposed weights of a read, normalised over valid tokens.

    Args:
      q_BTHK: queries of the read.
      keys: of the slots, one key head for each query head.
      x_BTHK: what the tokens bring, each head its part of the width.
      valid_BT: tokens that count.
      top_k: as of the read.
    """

    def bring(shards: Shards, q: Array, keys: ExtraKV, x: Array, valid: Array) -> tuple[Array, Array]:
        q_BTHK, x_BTHK, valid_BT = (shards.gather(a, 1) for a in (q, x, valid))
        weights_BTHN = slot_weights(q_BTHK, keys.k, top_k, shards)
        memory_BTHK = shards.sum(weigh(weights_BTHN, keys.v))
        weights_BTHN = weights_BTHN * valid_BT[:, :, None, None].astype(weights_BTHN.dtype)
        total_BHN = weights_BTHN.sum(axis=1)
        # A slot that no token asks for is left at zero; a smaller floor would overflow in the gradient's 1 / total^2.
        weights_BTHN = weights_BTHN / jnp.maximum(total_BHN, 1e-12)[:, None]
        to_slots = functools.partial(jnp.einsum, "bthn,bthk->bnhk", weights_BTHN.astype(memory_BTHK.dtype))
        return to_slots(memory_BTHK), to_slots(x_BTHK.astype(memory_BTHK.dtype))

    tokens, slots = ("batch", "time", "heads", "head"), ("batch", "slots", "heads", "head")
    keys_axes = ExtraKV(slots, slots)  # pyright: ignore[reportArgumentType]
    mapped = logical_shard_map(bring, (tokens, keys_axes, tokens, ("batch", "time")), (slots, slots))
    return mapped(q_BTHK, keys, x_BTHK, valid_BT)
