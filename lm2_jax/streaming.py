"""Any length of text through a model: pieces of fixed size, so that nothing recompiles."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax.length import check_stream
from lm2_jax.model import LanguageModel, ModelState, StreamState, check_rows
from lm2_jax.types import Array, Bool, Float, Int

Params = Any


def stream(
    model: LanguageModel,
    params: Params,
    tokens_BS: Int[Array, "B S"] | np.ndarray,
    state: ModelState | StreamState,
    valid_BS: Bool[Array, "B S"] | np.ndarray | None = None,
) -> tuple[Float[Array, "B S V"], StreamState]:
    """Feeds text of any length; any split of a text into calls gives the logits of one call.

    Args:
      model: the model.
      params: its parameters.
      tokens_BS: S >= 1 tokens per row.
      state: at a segment border (`model.init_state`), or what the call before returned.
      valid_BS: a prefix of each row; tokens after it are not fed. None: all.
    Returns:
      [B S V] logits, zero where nothing was fed, and the stream's state. At a segment border `.state` of it is the
      state that `model.apply` returns.
    Raises:
      ValueError: tokens or `valid` of another shape, a state of another model or of other rows, or a document that is
        longer than `decoder.max_tokens`.
    """
    pieces = _pieces(model, tokens_BS, valid_BS)
    logits, carry = [], _opened(model, params, state, np.shape(tokens_BS)[0])
    check_stream(model.config, carry, _counts(pieces))
    for piece in pieces:
        piece_logits, carry = advance(model, params, carry, *piece.arrays, all_logits=True)
        logits.append(piece_logits[:, : piece.used])
    return jnp.concatenate(logits, axis=1), carry


def absorb(
    model: LanguageModel,
    params: Params,
    tokens_BS: Int[Array, "B S"] | np.ndarray,
    state: ModelState | StreamState,
    valid_BS: Bool[Array, "B S"] | np.ndarray | None = None,
) -> tuple[Float[Array, "B V"], StreamState]:
    """As `stream`, but computes only the logits after each row's last token: memory is constant in S.

    Rows that are given no token have zero logits.
    """
    pieces = _pieces(model, tokens_BS, valid_BS)
    carry, logits = _opened(model, params, state, np.shape(tokens_BS)[0]), None
    check_stream(model.config, carry, _counts(pieces))
    for piece in pieces:
        piece_logits, carry = advance(model, params, carry, *piece.arrays, all_logits=False)
        fed_B1 = jnp.asarray(piece.arrays[1] > 0)[:, None]
        logits = piece_logits if logits is None else jnp.where(fed_B1, piece_logits, logits)
    assert logits is not None
    return logits, carry


@functools.partial(jax.jit, static_argnums=0)
def read_segment(
    model: LanguageModel, params: Params, state: ModelState, tokens_BT: Int[Array, "B T"], is_fed_B: Bool[Array, " B"]
) -> tuple[Float[Array, "B V"], ModelState]:
    """Feeds one full segment to some rows, from border to border.

    Args:
      model: the model.
      params: its parameters.
      state: at a border.
      tokens_BT: the segment of each row.
      is_fed_B: the rows that take theirs; the state of the others stays bit-equal.
    Returns:
      Logits after the last token of the rows that were fed, and the state.
    """
    valid_BT = jnp.broadcast_to(is_fed_B[:, None], tokens_BT.shape)
    out = _apply(model, {"params": params}, tokens_BT, state, None, valid_BT, method="forward")
    logits_B1V = _apply(model, {"params": params}, out.hidden[:, -1:], method="logits")
    return logits_B1V[:, 0], out.state


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def open_rows(model: LanguageModel, params: Params, carry: StreamState, rows_B: Bool[Array, " B"]) -> StreamState:
    """Begins a segment that arrives in pieces in some rows, whose `carry.state` is at a border."""
    opened = _apply(model, {"params": params}, carry.state, rows_B.shape[0], method="open")
    # Every array of an open layer has the layers axis first and the batch next.
    groups = jax.tree.map(
        lambda new, old: jnp.where(rows_B.reshape(1, -1, *[1] * (old.ndim - 2)), new, old), opened.groups, carry.groups
    )
    return carry._replace(position=jnp.where(rows_B, 0, carry.position), groups=groups)


class _Piece:
    """At most T tokens per row, padded to one of a few sizes."""

    def __init__(self, tokens_BS: np.ndarray, count_B: np.ndarray, size: int):
        self.used = tokens_BS.shape[1]
        padded_BS = np.zeros((tokens_BS.shape[0], size), np.int32)
        padded_BS[:, : self.used] = tokens_BS
        self.arrays = (padded_BS, count_B)


def _pieces(model: LanguageModel, tokens_BS: Any, valid_BS: Any) -> list[_Piece]:
    """The text cut at multiples of T; the rest is padded to the next power of four, so few programs are compiled."""
    tokens_BS = np.asarray(tokens_BS)
    if tokens_BS.ndim != 2 or tokens_BS.shape[1] == 0:
        raise ValueError(f"tokens must have shape [B, S] with S >= 1, got {list(tokens_BS.shape)}")
    length_B = np.full(tokens_BS.shape[0], tokens_BS.shape[1])
    if valid_BS is not None:
        valid_BS = np.asarray(valid_BS)
        if valid_BS.shape != tokens_BS.shape or (np.diff(valid_BS.astype(np.int8), axis=1) > 0).any():
            raise ValueError("valid must have the shape of tokens and be true on a prefix of each row")
        length_B = valid_BS.sum(axis=1)
    T, pieces = model.config.segment_tokens, []
    for first in range(0, tokens_BS.shape[1], T):
        part_BS = tokens_BS[:, first : first + T]
        size = 1
        while size < part_BS.shape[1]:
            size = min(size * 4, T)
        pieces.append(_Piece(part_BS, np.clip(length_B - first, 0, part_BS.shape[1]).astype(np.int32), size))
    return pieces


def _counts(pieces: list[_Piece]) -> np.ndarray:
    """Tokens of each row in all pieces."""
    return np.sum([piece.arrays[1] for piece in pieces], axis=0)


def _opened(model: LanguageModel, params: Params, state: ModelState | StreamState, batch: int) -> StreamState:
    """The open segment to continue; a copy, because each step takes over the arrays of the one before."""
    if not isinstance(state, StreamState):
        return open_segment(model, params, state, batch)
    check_rows(state.position.shape[0], batch)
    return _copied(state)


@jax.jit
def _copied(carry: StreamState) -> StreamState:
    return jax.tree.map(jnp.copy, carry)


@functools.partial(jax.jit, static_argnums=(0, 3))
def open_segment(model: LanguageModel, params: Params, state: ModelState, batch: int) -> StreamState:
    """Begins a segment that arrives in pieces in all rows."""
    return _apply(model, {"params": params}, state, batch, method="open")


@functools.partial(jax.jit, static_argnums=0, static_argnames="all_logits", donate_argnums=2)
def advance(
    model: LanguageModel,
    params: Params,
    carry: StreamState,
    tokens_BS: Int[Array, "B S"],
    count_B: Int[Array, " B"],
    *,
    all_logits: bool,
) -> tuple[Array, StreamState]:
    """Feeds up to S <= T tokens per row, over at most one segment border, and returns logits; `carry` is given up.

    Rows that are all at a border and bring a full segment, or nothing, take the same path as training.
    """
    variables, T, S = {"params": params}, model.config.segment_tokens, tokens_BS.shape[1]

    def in_pieces(carry: StreamState) -> tuple[Array, StreamState]:
        first_B = jnp.minimum(count_B, T - carry.position)
        hidden_BSD, carry = _extend(model, variables, tokens_BS, first_B, carry)
        if S == 1:
            return hidden_BSD, carry
        rest_B = count_B - first_B
        shift_BS = jnp.minimum(jnp.arange(S)[None] + first_B[:, None], S - 1)

        def over_border(carry: StreamState) -> tuple[Array, StreamState]:
            rest_BS = jnp.take_along_axis(tokens_BS, shift_BS, axis=1)
            rest_BSD, after = _extend(model, variables, rest_BS, rest_B, carry)
            back_BS = jnp.maximum(jnp.arange(S)[None] - first_B[:, None], 0)
            rest_BSD = jnp.take_along_axis(rest_BSD, back_BS[:, :, None], axis=1)
            is_after_BS1 = (jnp.arange(S)[None] >= first_B[:, None])[:, :, None]
            return jnp.where(is_after_BS1, rest_BSD, hidden_BSD), after

        return jax.lax.cond((rest_B > 0).any(), over_border, lambda carry: (hidden_BSD, carry), carry)

    def full(carry: StreamState) -> tuple[Array, StreamState]:
        valid_BS = jnp.broadcast_to((count_B > 0)[:, None], tokens_BS.shape)
        out = _apply(model, variables, tokens_BS, carry.state, None, valid_BS, method="forward")
        return out.hidden, _apply(model, variables, out.state, tokens_BS.shape[0], method="open")

    if S == T and T > 1:
        aligned = ((carry.position == 0) & ((count_B == T) | (count_B == 0))).all()
        hidden_BSD, carry = jax.lax.cond(aligned, full, in_pieces, carry)
    else:
        hidden_BSD, carry = in_pieces(carry)
    if not all_logits:
        last_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
        hidden_BSD = jnp.take_along_axis(hidden_BSD, last_B11, axis=1)
    logits_BSV = _apply(model, variables, hidden_BSD, method="logits")
    fed_BS = jnp.arange(hidden_BSD.shape[1])[None] < (count_B if all_logits else jnp.minimum(count_B, 1))[:, None]
    logits_BSV = jnp.where(fed_BS[:, :, None], logits_BSV, jnp.zeros_like(logits_BSV))
    return (logits_BSV if all_logits else logits_BSV[:, 0]), carry


def _apply(model: LanguageModel, variables: Any, *args: Any, method: str) -> Any:
    """`model.apply`, whose type says nothing of what a method returns."""
    return model.apply(variables, *args, method=method)


def _extend(
    model: LanguageModel, variables: Any, tokens_BS: Array, count_B: Array, carry: StreamState
) -> tuple[Array, StreamState]:
    """Extends the open segment and closes it where it is full."""
    hidden_BSD, carry = _apply(model, variables, tokens_BS, count_B, carry, method="extend")
    full_B = carry.position == model.config.segment_tokens
    closed = functools.partial(_apply, model, variables, method="close")
    return hidden_BSD, jax.lax.cond(full_B.any(), lambda c: closed(c, full_B), lambda c: c, carry)
