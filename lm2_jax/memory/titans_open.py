"""A Titans memory inside an unfinished segment: one token costs about a token, and rows stand where they stand.

What a token would change is found once, at its chunk's start weights, and kept: its gradient as rows of X and G
(`chunk_form`). A token that arrives later in the chunk reads through these rows; when a row's chunk is full, its
weights move on.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm2_jax.memory.chunk_form import Fast, Gradients, Rates, advance, linearise, presence, recall, rows_of
from lm2_jax.memory.titans_chunks import Rules, Tokens, hold, over_heads
from lm2_jax.types import Array, Bool, Float, Int


class OpenChunk(NamedTuple):
    """The tokens so far of each row's unfinished chunk; places that are not `valid` hold what an older chunk left."""

    gradients: Gradients  # [B H C ..] at the chunk's start weights
    rates: Rates  # [B H C]
    valid: Bool[Array, "B C"]


def empty_chunk(fast: Fast, like: Rates, chunk_tokens: int) -> OpenChunk:
    """No tokens.

    Args:
      fast: weights of all layers, [B H I O].
      like: rates [B S H] of any tokens, for which of them there are.
      chunk_tokens: places C.
    """
    (B, H), dtype = fast.weights[0].shape[:2], fast.weights[0].dtype
    zeros = lambda *width: jnp.zeros((B, H, chunk_tokens, *width), dtype)  # noqa: E731
    gradients = Gradients(
        tuple(zeros(w.shape[2]) for w in fast.weights), tuple(zeros(w.shape[3]) for w in fast.weights)
    )
    return OpenChunk(gradients, jax.tree.map(lambda _: zeros(), like), jnp.zeros((B, chunk_tokens), bool))


class _Turn(NamedTuple):
    """Which of S new tokens each row takes into its unfinished chunk in one turn."""

    index: Int[Array, "B M"]  # among the S, or S for none
    place: Int[Array, "B M"]  # in the chunk, or C for none


def _turns(slot_BS: Array, live_BS: Array, C: int) -> _Turn:
    """[turns B M]: S tokens, wherever in its chunk a row stands, reach over at most this many chunks."""
    S = slot_BS.shape[1]
    turns, M = (S - 2) // C + 2 if S > 1 else 1, min(S, C)
    first_B = jnp.where(live_BS[:, 0], slot_BS[:, 0] % C, 0)
    ends_JB = (jnp.arange(turns)[:, None] + 1) * C - first_B[None]
    index_JBM = jnp.maximum(ends_JB - C, 0)[:, :, None] + jnp.arange(M)[None, None]
    row_1B1, taken_JBM = jnp.arange(slot_BS.shape[0])[None, :, None], jnp.minimum(index_JBM, S - 1)
    counts = (index_JBM < S) & (index_JBM < ends_JB[:, :, None]) & live_BS[row_1B1, taken_JBM]
    return _Turn(jnp.where(counts, index_JBM, S), jnp.where(counts, slot_BS[row_1B1, taken_JBM] % C, C))


def feed(
    rules: Rules,
    norm: Any,
    scale_C: Float[Array, " C"] | None,
    slot_BS: Int[Array, "B S"],
    tokens: Tokens,
    fast: Fast,
    part: OpenChunk,
) -> tuple[Float[Array, "B S H K"] | None, Fast, OpenChunk]:
    """S more tokens of each row; with queries, each token asks the weights behind itself.

    Args:
      rules: network, loss, chunk size and granularity of the rates.
      norm: slow weights of the network's norm, [H K], or None.
      scale_C: see `presence`.
      slot_BS: places in the segment, one after the other.
      tokens: [B S H ..]; those that are not valid stand behind the others and do not count.
      fast: at the start of each row's unfinished chunk.
      part: that chunk.
    Returns:
      Answers [B S H K], meaningless for tokens that do not count, or None; and both with the new tokens.
    """
    row_B1 = jnp.arange(slot_BS.shape[0])[:, None]
    y_BSHK = None if tokens.q is None else jnp.zeros_like(tokens.q)

    def step(carry: tuple[Any, ...], turn: _Turn) -> tuple[tuple[Any, ...], None]:
        fast, part, y_BSHK = carry
        taken_BM = jnp.minimum(turn.index, slot_BS.shape[1] - 1)
        new = jax.tree.map(lambda a: jnp.moveaxis(a[row_B1, taken_BM], 1, 2), tokens[:4])
        part = part._replace(valid=part.valid.at[row_B1, turn.place].set(True, mode="drop"))
        kept, y_BHMK = _take(rules, norm, scale_C, fast, part, new, turn.place)
        part = part._replace(gradients=kept[0], rates=kept[1])
        if y_BSHK is not None and y_BHMK is not None:
            y_BSHK = y_BSHK.at[row_B1, turn.index].set(jnp.moveaxis(y_BHMK, 1, 2), mode="drop")
        full_B = part.valid.all(axis=1)
        fast = jax.lax.cond(
            full_B.any(), lambda fast: _move_on(rules, norm, scale_C, full_B, fast, part), lambda fast: fast, fast
        )
        return (fast, part._replace(valid=part.valid & ~full_B[:, None]), y_BSHK), None

    turns = _turns(slot_BS, tokens.valid, rules.chunk_tokens)
    (fast, part, y_BSHK), _ = jax.lax.scan(step, (fast, part, y_BSHK), turns)
    return y_BSHK, fast, part


def _take(
    rules: Rules, norm: Any, scale_C: Array | None, fast: Fast, part: OpenChunk, new: Any, place_BM: Array
) -> tuple[tuple[Gradients, Rates], Array | None]:
    """The chunk's rows with M new tokens (q, k, v, rates), [B H M ..], and the tokens' answers."""
    C, H = rules.chunk_tokens, fast.weights[0].shape[1]

    def head(norm: Any, fast: Fast, old: Any, valid_C: Array, place_M: Array, new: Any) -> Any:
        q_MK, k_MK, v_MK, rates = new
        found, _ = linearise(rules.network, rules.loss, fast.weights, k_MK, v_MK, norm)
        kept = jax.tree.map(lambda held, row: held.at[place_M].set(row, mode="drop"), old, (found, rates))
        if q_MK is None:
            return kept, None
        weights, _ = presence(hold(kept[1], valid_C, rules.held), valid_C, scale_C)
        there = rows_of(weights, jnp.minimum(place_M, C - 1))
        return kept, recall(rules.network, fast, kept[0], there, q_MK, norm)

    valid_BHC, place_BHM = (jnp.broadcast_to(a[:, None], (a.shape[0], H, a.shape[1])) for a in (part.valid, place_BM))
    return over_heads(head)(norm, fast, (part.gradients, part.rates), valid_BHC, place_BHM, new)


def _move_on(rules: Rules, norm: Any, scale_C: Array | None, full_B: Array, fast: Fast, part: OpenChunk) -> Fast:
    """Weights and momentum behind the chunk, in rows where it is full."""

    def head(_: Any, fast: Fast, gradients: Gradients, rates: Rates) -> Fast:
        valid_C = jnp.ones(rules.chunk_tokens, bool)
        return advance(rules.network, fast, gradients, *presence(hold(rates, valid_C, rules.held), valid_C, scale_C))

    after = over_heads(head)(norm, fast, part.gradients, part.rates)
    return jax.tree.map(lambda new, old: jnp.where(full_B[:, None, None, None], new, old), after, fast)
