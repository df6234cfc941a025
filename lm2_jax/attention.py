"""Causal attention within a segment, with an optional window into the one before."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm2_jax.decoder import DecoderConfig
from lm2_jax.layers import Einsum, constrain, rope_frequencies, rotate
from lm2_jax.precision import Precision
from lm2_jax.state import reset_rows, select_rows, stop_where
from lm2_jax.types import Array, Bool, Float, Int


class Segments(NamedTuple):
    """What a block needs to know of the K segments it is given, beside the tokens."""

    reset: Bool[Array, "B K"]  # the row begins a document at this segment
    cut: Bool[Array, " K"]  # no gradient flows from this segment into the one before
    valid: Bool[Array, "B K T"]
    document: Int[Array, "B K T"] | None  # number of the document within the segment, where documents are packed


class Window(NamedTuple):
    """The last W keys and values of a segment, unrotated: in the next one they stand at positions -W .. -1."""

    k: Float[Array, "B W G K"]
    v: Float[Array, "B W G K"]
    valid: Bool[Array, "B W"]
    fresh: Bool[Array, " B"]


WINDOW_AXES = Window(
    k=("batch", "time", "kv_heads", "head"),  # pyright: ignore[reportArgumentType]
    v=("batch", "time", "kv_heads", "head"),  # pyright: ignore[reportArgumentType]
    valid=("batch", "time"),  # pyright: ignore[reportArgumentType]
    fresh=("batch",),  # pyright: ignore[reportArgumentType]
)


class Attended(NamedTuple):
    """What a block's memory may use of self-attention, beside its output."""

    y: Float[Array, "B *J T D"]
    q: Float[Array, "B *J T H K"]  # unrotated
    k: Float[Array, "B *J T G K"]  # rotated to the token's position
    v: Float[Array, "B *J T G K"]


class OpenAttention(NamedTuple):
    """Attention inside an unfinished segment: rotated keys of its tokens so far, and the window before them."""

    k: Float[Array, "B T G K"]
    v: Float[Array, "B T G K"]
    window: Window | None


def attend(
    q: Float[Array, "R T H K"],
    k: Float[Array, "R S G K"],
    v: Float[Array, "R S G K"],
    mask: Bool[Array, "R 1 #T S"],
    causal: bool = False,
) -> Float[Array, "R T H K"]:
    """Grouped-query softmax attention.

    `jax.nn.dot_product_attention`, except in float64: there it would compute the softmax in float32.
    """
    if q.dtype != jnp.float64:
        with jax.numpy_dtype_promotion("standard"):  # it mixes bfloat16 with float32
            return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)
    R, T, H, K = q.shape
    S, G = k.shape[1:3]
    if causal:
        mask = mask & jnp.tril(jnp.ones((T, S), bool))[None, None]
    score = jnp.einsum("rtgnk,rsgk->rgnts", q.reshape(R, T, G, H // G, K), k) / math.sqrt(K)
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], score, jnp.finfo(q.dtype).min), axis=-1)
    return jnp.einsum("rgnts,rsgk->rtgnk", weights, v).reshape(q.shape)


class Attention(nn.Module):
    """Grouped-query attention with RoPE; positions count from the segment's start."""

    decoder: DecoderConfig
    precision: Precision

    def setup(self) -> None:
        d = self.decoder
        D, H, G, K = d.width, d.num_heads, d.num_kv_heads, d.head_dim
        self.q_proj = Einsum((D, H, K), ("embed", "heads", "head"), self.precision)
        self.k_proj = Einsum((D, G, K), ("embed", "kv_heads", "head"), self.precision)
        self.v_proj = Einsum((D, G, K), ("embed", "kv_heads", "head"), self.precision)
        self.o_proj = Einsum((H, K, D), ("heads", "head", "embed"), self.precision, in_dims=2)

    @functools.cached_property
    def frequencies(self) -> np.ndarray:
        """Radians per position."""
        return rope_frequencies(self.decoder.head_dim, self.decoder.rope_theta, self.decoder.rope_scaling)

    @property
    def window_keys(self) -> int:
        """Keys W that are carried across a border; 0 without a window."""
        return (self.decoder.window_tokens or 1) - 1

    def init_window(self, batch: int) -> Window | None:
        """An empty window, or None where attention stays in its segment."""
        if self.window_keys == 0:
            return None
        shape = (batch, self.window_keys, self.decoder.num_kv_heads, self.decoder.head_dim)
        zeros = jnp.zeros(shape, jnp.dtype(self.precision.compute))
        return Window(zeros, zeros, jnp.zeros(shape[:2], bool), jnp.ones(batch, bool))

    def q(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead H K"]:
        """Queries, unrotated."""
        return self.q_proj("...d,dhk->...hk", x)

    def kv(self, x: Float[Array, "*lead D"]) -> tuple[Float[Array, "*lead G K"], Float[Array, "*lead G K"]]:
        """Keys, unrotated, and values."""
        return self.k_proj("...d,dgk->...gk", x), self.v_proj("...d,dgk->...gk", x)

    def o(self, y: Float[Array, "*lead H K"]) -> Float[Array, "*lead D"]:
        """Merges the heads."""
        return self.o_proj("...hk,hkd->...d", y)

    def __call__(
        self, x_BJTD: Float[Array, "B J T D"], window: Window | None, segments: Segments
    ) -> tuple[Attended, Window | None]:
        """Attends within J segments at once.

        Args:
          x_BJTD: normalised input.
          window: state before the first segment.
          segments: borders and padding.
        Returns:
          Output, queries, keys and values of the J segments, and the window after the last one.
        """
        B, J, T, _ = x_BJTD.shape
        q_BJTHK = self.q(x_BJTD)
        k_BJTGK, v_BJTGK = self.kv(x_BJTD)
        before, window = self._windows(k_BJTGK, v_BJTGK, window, segments)
        here = jnp.arange(T)
        fold = functools.partial(_fold, rows=B * J)
        rotated_BJTGK = rotate(k_BJTGK, here, self.frequencies)
        q, k = fold(rotate(q_BJTHK, here, self.frequencies)), fold(rotated_BJTGK)
        v, valid, document = fold(v_BJTGK), fold(segments.valid), segments.document
        document = None if document is None else fold(document)
        q = constrain(q, ("batch", "time", "heads", "head"))
        if before is None:
            mask = valid[:, None, None, :]
            if document is not None:
                mask = mask & (document[:, None, :, None] == document[:, None, None, :])
            y = attend(q, k, v, mask, causal=True)
        else:
            W = self.window_keys
            past = fold(rotate(before.k, jnp.arange(-W, 0), self.frequencies))
            k, v = jnp.concatenate([past, k], axis=1), jnp.concatenate([fold(before.v), v], axis=1)
            seen = fold(before.valid & ~before.fresh[..., None])
            mask = self._window_mask(jnp.broadcast_to(here, (B * J, T)), jnp.concatenate([seen, valid], axis=1))
            if document is not None:
                # What came before the segment belongs to its first document.
                keys = jnp.concatenate([jnp.zeros((B * J, W), document.dtype), document], axis=1)
                mask = mask & (document[:, None, :, None] == keys[:, None, None, :])
            y = attend(q, k, v, mask)
        return Attended(self.o(y.reshape(q_BJTHK.shape)), q_BJTHK, rotated_BJTGK, v_BJTGK), window

    def from_behind(
        self,
        x_BND: Float[Array, "B N D"],
        k_BTGK: Float[Array, "B T G K"],
        v_BTGK: Float[Array, "B T G K"],
        valid_BT: Bool[Array, "B T"],
    ) -> Float[Array, "B N D"]:
        """Rows that stand together right behind the segment attend to it and to each other, in one softmax.

        Args:
          x_BND: normalised rows.
          k_BTGK: rotated keys of the segment.
          v_BTGK: its values.
          valid_BT: its padding.
        """
        T, N = valid_BT.shape[1], x_BND.shape[1]
        behind = jnp.full(N, T)
        k_BNGK, v_BNGK = self.kv(x_BND)
        k = jnp.concatenate([k_BTGK, rotate(k_BNGK, behind, self.frequencies)], axis=1)
        v = jnp.concatenate([v_BTGK, v_BNGK], axis=1)
        mask = jnp.concatenate([valid_BT, jnp.ones((valid_BT.shape[0], N), bool)], axis=1)[:, None, None, :]
        q_BNHK = rotate(self.q(x_BND), behind, self.frequencies)
        return self.o(attend(q_BNHK, k, v, mask))

    def _window_mask(self, position_BT: Int[Array, "B T"], seen_BS: Bool[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
        """Keys stand at -W .. T-1; a query sees itself and the W keys before it."""
        key_11S = (jnp.arange(seen_BS.shape[1]) - self.window_keys)[None, None, :]
        query_BT1 = position_BT[:, :, None]
        mask_BTS = (key_11S <= query_BT1) & (key_11S >= query_BT1 - self.window_keys) & seen_BS[:, None, :]
        return mask_BTS[:, None]

    def _windows(
        self, k_BJTGK: Array, v_BJTGK: Array, window: Window | None, segments: Segments
    ) -> tuple[Window | None, Window | None]:
        """The window each segment sees, [B J ...], and the one after the last; padding-only segments leave no trace."""
        if window is None:
            return None, None
        W = self.window_keys
        valid_BJW = segments.valid[:, :, -W:]
        if segments.document is not None:
            last_BJ1 = jnp.where(segments.valid, segments.document, 0).max(axis=2, keepdims=True)
            valid_BJW = valid_BJW & (segments.document[:, :, -W:] == last_BJ1)
        # What is never seen is zero, so that no padding shows in the state.
        k_BJWGK, v_BJWGK = (jnp.where(valid_BJW[..., None, None], a[:, :, -W:], 0) for a in (k_BJTGK, v_BJTGK))

        def step(window: Window, inputs: tuple[Array, ...]) -> tuple[Window, Window]:
            k, v, valid, any_valid, reset, cut = inputs
            window = stop_where(cut, reset_rows(window, reset, WINDOW_AXES))
            last = Window(k, v, valid, jnp.zeros_like(reset))
            return select_rows(any_valid, last, window, WINDOW_AXES), window

        per_segment = (k_BJWGK, v_BJWGK, valid_BJW, segments.valid.any(axis=2), segments.reset)
        inputs = (*(jnp.moveaxis(a, 1, 0) for a in per_segment), segments.cut)
        window, before = jax.lax.scan(step, window, inputs)
        return Window(*(jnp.moveaxis(a, 0, 1) for a in before)), window

    def open(self, window: Window | None, batch: int, segment_tokens: int) -> OpenAttention:
        """Begins a segment that arrives in pieces."""
        shape = (batch, segment_tokens, self.decoder.num_kv_heads, self.decoder.head_dim)
        zeros = jnp.zeros(shape, jnp.dtype(self.precision.compute))
        return OpenAttention(zeros, zeros, window)

    def extend(
        self,
        x_BSD: Float[Array, "B S D"],
        position_BS: Int[Array, "B S"],
        slot_BS: Int[Array, "B S"],
        state: OpenAttention,
    ) -> tuple[Attended, OpenAttention]:
        """Attends from S new tokens to all of their segment so far.

        Args:
          x_BSD: normalised input.
          position_BS: positions within the segment.
          slot_BS: where their keys are kept: the position, or T and more for tokens that do not count.
          state: keys and values so far.
        Returns:
          Output, queries, keys and values of the S tokens, and the state with the new keys.
        """
        q_BSHK = self.q(x_BSD)
        k_BSGK, v_BSGK = self.kv(x_BSD)
        rows = jnp.arange(x_BSD.shape[0])[:, None]
        k_BSGK = rotate(k_BSGK, position_BS, self.frequencies)
        k = state.k.at[rows, slot_BS].set(k_BSGK, mode="drop")
        v = state.v.at[rows, slot_BS].set(v_BSGK, mode="drop")
        state = state._replace(k=k, v=v)
        seen = jnp.ones(k.shape[:2], bool)  # later positions are masked by causality
        if state.window is not None:
            W, window = self.window_keys, state.window
            k = jnp.concatenate([rotate(window.k, jnp.arange(-W, 0), self.frequencies), k], axis=1)
            v = jnp.concatenate([window.v, v], axis=1)
            seen = jnp.concatenate([window.valid & ~window.fresh[:, None], seen], axis=1)
            mask = self._window_mask(position_BS, seen)
        else:
            mask = (jnp.arange(k.shape[1])[None, None, :] <= position_BS[:, :, None])[:, None]
        q = rotate(q_BSHK, position_BS, self.frequencies)
        y_BSHK = attend(q, k, v, mask)
        return Attended(self.o(y_BSHK), q_BSHK, k_BSGK, v_BSGK), state

    def close(self, state: OpenAttention) -> Window | None:
        """The window after a full segment."""
        if state.window is None:
            return None
        W, T = self.window_keys, state.k.shape[1]
        k = rotate(state.k[:, T - W :], -jnp.arange(T - W, T), self.frequencies)
        rows = jnp.ones(k.shape[:2], bool)
        return Window(k, state.v[:, T - W :], rows, jnp.zeros_like(state.window.fresh))


def _fold(a: Array, rows: int) -> Array:
    """[B J ...] as [B*J ...]: segments become rows."""
    return a.reshape(rows, *a.shape[2:])
