"""Full attention: the keys and values of a document so far, carried from segment to segment.

With T tokens a segment, token i of the n-th segment of a document is at position n T + i. A query at position p sees
all keys of its document at positions s <= p:

    y_p = softmax_s(q_p R(p) . k_s R(s) / sqrt(K)) v_s,    R(p) the rotation of RoPE by position p

so segments bound nothing: they are the pieces in which the text is processed. J segments of one call attend in one
product, to the cache and to each other. Padding inside a segment takes up positions; a segment of padding takes none.

A document longer than `decoder.max_tokens` has no defined result: all outputs at the positions that do not fit are NaN,
also where nothing outside a compiled program can count tokens. `check_room` finds it earlier, wherever the numbers are
known on the host.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax.errors import TooLongError
from lm2_jax.state import Segments, stop_where
from lm2_jax.types import Array, Bool, Float, Int


class Cache(NamedTuple):
    """Keys and values of a document, place s for position s; what is never seen is zero."""

    k: Float[Array, "B M G K"]  # rotated to their positions
    v: Float[Array, "B M G K"]
    valid: Bool[Array, "B M"]
    segments: Int[Array, " B"]  # of the document so far, those of padding alone not counted
    is_start: Bool[Array, " B"]

    @property
    def used_segments(self) -> Int[Array, " B"]:
        """Segments of the document that the next token belongs to."""
        return jnp.where(self.is_start, 0, self.segments)


CACHE_AXES: Any = Cache(
    k=("batch", "window", "kv_heads", "head"),  # pyright: ignore[reportArgumentType]
    v=("batch", "window", "kv_heads", "head"),  # pyright: ignore[reportArgumentType]
    valid=("batch", "window"),  # pyright: ignore[reportArgumentType]
    segments=("batch",),  # pyright: ignore[reportArgumentType]
    is_start=("batch",),  # pyright: ignore[reportArgumentType]
)


class Span(NamedTuple):
    """Where the J segments of a call are in their documents."""

    position: Int[Array, "B J T"]  # in the document
    document: Int[Array, "B J T"]  # its number in the call; 0: the one in the cache
    last_B: Int[Array, " B"]  # number of the document that stays open; that of the cache if nothing is valid
    segments_B: Int[Array, " B"]  # of that document after the call
    is_start_B: Bool[Array, " B"]  # after the call


def empty_cache(batch: int, places: int, groups: int, head_width: int, dtype: Any) -> Cache:
    """A cache of rows that begin a document."""
    zeros = jnp.zeros((batch, places, groups, head_width), dtype)
    return Cache(zeros, zeros, jnp.zeros((batch, places), bool), jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool))


def span_of(cache: Cache, segments: Segments) -> Span:
    """Positions and document numbers of the tokens of a call, from its resets, padding and packed documents."""
    B, J, T = segments.valid.shape
    inner_BJT = jnp.zeros((B, J, T), jnp.int32) if segments.document is None else segments.document
    last_BJ = jnp.where(segments.valid, inner_BJT, 0).max(axis=2)

    def step(carry: tuple[Array, Array, Array], inputs: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        used_B, document_B, is_start_B = carry
        reset_B, any_valid_B, last_B = inputs
        begins_B = is_start_B | reset_B
        first_B, number_B = jnp.where(begins_B, 0, used_B), document_B + begins_B.astype(jnp.int32)
        after = (jnp.where(last_B > 0, 0, first_B) + 1, number_B + last_B, jnp.zeros_like(begins_B))
        before = (used_B, document_B, begins_B)
        kept = tuple(jnp.where(any_valid_B, a, b) for a, b in zip(after, before, strict=True))
        return kept, (first_B, number_B)

    start = (cache.segments, jnp.zeros(B, jnp.int32), cache.is_start)
    inputs = (segments.reset.T, segments.valid.any(axis=2).T, last_BJ.T)
    (used_B, last_B, is_start_B), (first_JB, number_JB) = jax.lax.scan(step, start, inputs)
    # A document that begins inside a segment counts from that segment's start.
    first_BJT = jnp.where(inner_BJT == 0, first_JB.T[:, :, None], 0)
    return Span(
        first_BJT * T + jnp.arange(T)[None, None], number_JB.T[:, :, None] + inner_BJT, last_B, used_B, is_start_B
    )


def visible_cache(cache: Cache, segments: Segments) -> Cache:
    """The cache as the tokens of a call see it: zeros in rows of padding and in those that begin a document."""
    seen_B = segments.valid.any(axis=(1, 2)) & ~cache.is_start
    k, v = (jnp.where(seen_B[:, None, None, None], a, 0) for a in (cache.k, cache.v))
    cache = cache._replace(k=k, v=v, valid=cache.valid & seen_B[:, None])
    return cache if segments.cut is None else stop_where(segments.cut[0], cache)


def append(
    cache: Cache, k: Float[Array, "B S G K"], v: Float[Array, "B S G K"], valid: Bool[Array, "B S"], span: Span
) -> Cache:
    """The cache after the tokens of a call: those of the document that stays open; others begin none of their own.

    Args:
      cache: before the call.
      k: rotated keys of the J segments, S = J T.
      v: their values.
      valid: tokens that count.
      span: where they are.
    """
    B, places = cache.valid.shape
    kept_BS = valid & (span.document.reshape(B, -1) == span.last_B[:, None])
    keep_B = span.last_B == 0  # also true in a row of padding, which stays as it is
    place_BS = jnp.where(kept_BS, span.position.reshape(B, -1), places)  # beyond the last place, nothing is kept
    rows = jnp.arange(B)[:, None]

    def put(old: Array, new: Array) -> Array:
        kept = jnp.where(keep_B.reshape(B, *[1] * (old.ndim - 1)), old, jnp.zeros_like(old))
        return kept.at[rows, place_BS].set(new.astype(old.dtype), mode="drop")

    return Cache(put(cache.k, k), put(cache.v, v), put(cache.valid, kept_BS), span.segments_B, span.is_start_B)


def append_segment(cache: Cache, k: Float[Array, "B T G K"], v: Float[Array, "B T G K"]) -> Cache:
    """The cache after a full segment that arrived in pieces."""
    B, T = k.shape[:2]
    no, yes = jnp.zeros((B, 1), bool), jnp.ones((B, 1, T), bool)
    span = span_of(cache, Segments(reset=no, cut=None, valid=yes, document=None))
    return append(cache, k, v, yes[:, 0], span)


def next_block(cut_J: Bool[Array, " J"]) -> Int[Array, " J"]:
    """For each segment, the one at which the next block of truncated backpropagation begins; J if there is none."""
    block_J = jnp.cumsum(cut_J)
    return jnp.searchsorted(block_J, block_J, side="right")


def poison(
    y: Float[Array, "B S H K"], position_BS: Int[Array, "B S"], valid_BS: Bool[Array, "B S"] | None, max_tokens: int
) -> Float[Array, "B S H K"]:
    """`y` with NaN where a valid token is at a position that no document may have."""
    fits_BS = position_BS < max_tokens
    fits_BS = fits_BS if valid_BS is None else fits_BS | ~valid_BS
    return jnp.where(fits_BS[:, :, None, None], y, jnp.asarray(jnp.nan, y.dtype))


def check_room(segments_B: np.ndarray, tokens_B: np.ndarray, segment_tokens: int, max_tokens: int) -> None:
    """Raises TooLongError where a row has no room for more tokens of its document.

    Args:
      segments_B: full segments of the document so far.
      tokens_B: tokens that follow them.
      segment_tokens: T.
      max_tokens: `decoder.max_tokens`.
    """
    total_B = segments_B * segment_tokens + tokens_B
    over = np.flatnonzero((total_B > max_tokens) & (tokens_B > 0))
    if over.size:
        row = int(over[0])
        raise TooLongError(
            f"row {row} would have {int(total_B[row])} tokens in one document, but this model attends to at most "
            f"model.decoder.max_tokens={max_tokens}; shorten the text, or train with a larger max_tokens"
        )
