"""Streaming: tokens are added to an unfinished chunk, at the cost of about one token each.

The gradient of a token is computed once, at the start weights of its chunk, and kept as rows of X and G (`chunk`).
Later tokens of the chunk read through these rows. When a row's chunk is full, its weights are updated. Each row of the
batch has its own position.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm2_jax.ops.ttt_chunk.chunk import (
    ChunkInputs,
    ChunkSpec,
    FastWeights,
    Rates,
    TokenGradients,
    chunk_rates,
    coefficients_at,
    decay_coefficients,
    over_rows_and_heads,
    per_token_gradients,
    read_per_token,
    update,
)
from lm2_jax.types import Array, Bool, Float, Int


class PartialChunk(NamedTuple):
    """The tokens of each row's unfinished chunk; entries that are not `valid` are leftovers of an older chunk."""

    gradients: TokenGradients  # [B H C ..] at the chunk's start weights
    rates: Rates  # [B H C]
    valid: Bool[Array, "B C"]


def empty_chunk(fast: FastWeights, like: Rates, chunk_tokens: int) -> PartialChunk:
    """A chunk without tokens.

    Args:
      fast: weights of all layers, [B H I O].
      like: rates of any tokens [B S H]; only which of them are None matters.
      chunk_tokens: C.
    """
    (B, H), dtype = fast.weights[0].shape[:2], fast.weights[0].dtype
    zeros = lambda *width: jnp.zeros((B, H, chunk_tokens, *width), dtype)  # noqa: E731
    inputs, outputs = (tuple(zeros(w.shape[axis]) for w in fast.weights) for axis in (2, 3))
    rates = jax.tree.map(lambda _: zeros(), like)
    return PartialChunk(TokenGradients(inputs, outputs), rates, jnp.zeros((B, chunk_tokens), bool))


class _Round(NamedTuple):
    """The tokens, of S new ones, that each row adds to one chunk."""

    index: Int[Array, "B M"]  # of the token, or S for none
    position: Int[Array, "B M"]  # in the chunk, or C for none


def _rounds(slot_BS: Array, valid_BS: Array, C: int) -> _Round:
    """[rounds B M]: the S tokens, one chunk per round; rounds suffice for any start position in a chunk."""
    S = slot_BS.shape[1]
    rounds, M = (S - 2) // C + 2 if S > 1 else 1, min(S, C)
    first_B = jnp.where(valid_BS[:, 0], slot_BS[:, 0] % C, 0)
    ends_JB = (jnp.arange(rounds)[:, None] + 1) * C - first_B[None]
    index_JBM = jnp.maximum(ends_JB - C, 0)[:, :, None] + jnp.arange(M)[None, None]
    row_1B1, safe_JBM = jnp.arange(slot_BS.shape[0])[None, :, None], jnp.minimum(index_JBM, S - 1)
    used = (index_JBM < S) & (index_JBM < ends_JB[:, :, None]) & valid_BS[row_1B1, safe_JBM]
    return _Round(jnp.where(used, index_JBM, S), jnp.where(used, slot_BS[row_1B1, safe_JBM] % C, C))


def ttt_step(
    spec: ChunkSpec,
    norm: Any,
    scale_C: Float[Array, " C"] | None,
    slot_BS: Int[Array, "B S"],
    inputs: ChunkInputs,
    fast: FastWeights,
    partial: PartialChunk,
) -> tuple[Float[Array, "B S H K"] | None, FastWeights, PartialChunk]:
    """Adds S tokens to each row.

    Args:
      spec: network, loss, chunk size and granularity of the rates.
      norm: parameters of the network's norm, [H K], or None.
      scale_C: see `decay_coefficients`.
      slot_BS: positions in the segment, consecutive.
      inputs: [B S H ..], `valid` [B S]; in each row, valid tokens come first.
      fast: weights and momentum at the start of each row's unfinished chunk.
      partial: that chunk.
    Returns:
      y [B S H K], undefined for tokens that are not valid, or None without queries; `fast` and `partial` after the
      tokens.
    """
    row_B1 = jnp.arange(slot_BS.shape[0])[:, None]
    y_BSHK = None if inputs.q is None else jnp.zeros_like(inputs.q)

    def add(carry: tuple[Any, ...], tokens: _Round) -> tuple[tuple[Any, ...], None]:
        fast, partial, y_BSHK = carry
        safe_BM = jnp.minimum(tokens.index, slot_BS.shape[1] - 1)
        new = jax.tree.map(lambda a: jnp.moveaxis(a[row_B1, safe_BM], 1, 2), inputs[:4])
        partial = partial._replace(valid=partial.valid.at[row_B1, tokens.position].set(True, mode="drop"))
        kept, y_BHMK = _add_tokens(spec, norm, scale_C, fast, partial, new, tokens.position)
        partial = partial._replace(gradients=kept[0], rates=kept[1])
        if y_BSHK is not None and y_BHMK is not None:
            y_BSHK = y_BSHK.at[row_B1, tokens.index].set(jnp.moveaxis(y_BHMK, 1, 2), mode="drop")
        full_B = partial.valid.all(axis=1)
        finish = lambda fast: _finish_chunk(spec, norm, scale_C, full_B, fast, partial)  # noqa: E731
        fast = jax.lax.cond(full_B.any(), finish, lambda fast: fast, fast)
        return (fast, partial._replace(valid=partial.valid & ~full_B[:, None]), y_BSHK), None

    rounds = _rounds(slot_BS, inputs.valid, spec.chunk_tokens)
    (fast, partial, y_BSHK), _ = jax.lax.scan(add, (fast, partial, y_BSHK), rounds)
    return y_BSHK, fast, partial


def _add_tokens(
    spec: ChunkSpec, norm: Any, scale_C: Any, fast: FastWeights, partial: PartialChunk, new: Any, position_BM: Array
) -> tuple[tuple[TokenGradients, Rates], Array | None]:
    """The chunk's gradients and rates with M new tokens (q, k, v, rates) [B H M ..], and y of these tokens."""
    C, H = spec.chunk_tokens, fast.weights[0].shape[1]

    def head(norm: Any, fast: FastWeights, old: Any, valid_C: Array, position_M: Array, new: Any) -> Any:
        q_MK, k_MK, v_MK, rates = new
        gradients, _ = per_token_gradients(spec.network, spec.loss, fast.weights, k_MK, v_MK, norm)
        kept = jax.tree.map(lambda a, row: a.at[position_M].set(row, mode="drop"), old, (gradients, rates))
        if q_MK is None:
            return kept, None
        weights, _ = decay_coefficients(chunk_rates(kept[1], valid_C, spec.rate_per_chunk), valid_C, scale_C)
        at_tokens = coefficients_at(weights, jnp.minimum(position_M, C - 1))
        return kept, read_per_token(spec.network, fast, kept[0], at_tokens, q_MK, norm)

    per_row = (partial.valid, position_BM)
    valid_BHC, position_BHM = (jnp.broadcast_to(a[:, None], (a.shape[0], H, a.shape[1])) for a in per_row)
    old = (partial.gradients, partial.rates)
    return over_rows_and_heads(head)(norm, fast, old, valid_BHC, position_BHM, new)


def _finish_chunk(
    spec: ChunkSpec, norm: Any, scale_C: Array | None, full_B: Array, fast: FastWeights, partial: PartialChunk
) -> FastWeights:
    """Weights and momentum after the chunk in rows where it is full, unchanged in the others."""

    def head(_: Any, fast: FastWeights, gradients: TokenGradients, rates: Rates) -> FastWeights:
        valid_C = jnp.ones(spec.chunk_tokens, bool)
        coefficients = decay_coefficients(chunk_rates(rates, valid_C, spec.rate_per_chunk), valid_C, scale_C)
        return update(spec.network, fast, gradients, *coefficients)

    after = over_rows_and_heads(head)(norm, fast, partial.gradients, partial.rates)
    return jax.tree.map(lambda new, old: jnp.where(full_B[:, None, None, None], new, old), after, fast)
