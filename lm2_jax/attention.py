"""Causal attention within a segment, with an optional window into the one before."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm2_jax.decoder import DecoderConfig
from lm2_jax.dot_product import Keys, attend, attend_behind
from lm2_jax.layers import Einsum, constrain, rope_frequencies, rotate
from lm2_jax.partition import parts
from lm2_jax.precision import Precision
from lm2_jax.splash import PADDING, obstacle, platform, splash_attend
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
    k=("batch", "window", "kv_heads", "head"),  # pyright: ignore[reportArgumentType]
    v=("batch", "window", "kv_heads", "head"),  # pyright: ignore[reportArgumentType]
    valid=("batch", "window"),  # pyright: ignore[reportArgumentType]
    fresh=("batch",),  # pyright: ignore[reportArgumentType]
)


class Attended(NamedTuple):
    """What a block's memory may use of self-attention, beside its output."""

    y: Float[Array, "B *J T D"]
    q: Float[Array, "B *J T H K"]  # unrotated
    k: Float[Array, "B *J T G K"]  # rotated to the token's position
    v: Float[Array, "B *J T G K"]


class Beside(NamedTuple):
    """Keys, as they stand, and values of rows that are no tokens but seen under the same softmax."""

    k: Float[Array, "B N G K"]
    v: Float[Array, "B N G K"]


class Asked(NamedTuple):
    """Segments, projected but not yet attended; leading dimensions B and J, or B for one segment."""

    q: Float[Array, "B *J T H K"]  # unrotated
    k: Float[Array, "B *J T G K"]  # rotated to the token's position
    v: Float[Array, "B *J T G K"]
    valid: Bool[Array, "B *J T"]
    document: Int[Array, "B *J T"] | None
    past: Window | None  # before each segment: [B *J W ...]


class OpenAttention(NamedTuple):
    """Attention inside an unfinished segment: rotated keys of its tokens so far, and what else they see."""

    k: Float[Array, "B T G K"]
    v: Float[Array, "B T G K"]
    window: Window | None
    always: Beside | None = None  # rows that every token sees
    own: Beside | None = None  # a row per token, seen from that token on


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
        """Keys W that are carried across a border; 0 without a window, and in one that holds only the token itself."""
        return (self.decoder.window_tokens or 1) - 1

    @property
    def has_window(self) -> bool:
        """Whether a token sees `decoder.window_tokens` keys at most."""
        return self.decoder.window_tokens is not None

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

    def beside(self, x_BND: Float[Array, "B N D"], position: Int[Array, "..."] | None = None) -> Beside:
        """Keys and values of rows that are no tokens of the segment.

        Args:
          x_BND: normalised rows.
          position: where they stand; None: all at the segment's start, so that a query's place in the segment turns
            the score of all of them alike, whatever number of segments came before.
        """
        k_BNGK, v_BNGK = self.kv(x_BND)
        return Beside(k_BNGK if position is None else rotate(k_BNGK, position, self.frequencies), v_BNGK)

    def __call__(
        self,
        x_BJTD: Float[Array, "B J T D"],
        window: Window | None,
        segments: Segments,
        always: Beside | None = None,
    ) -> tuple[Attended, Window | None]:
        """Attends within J segments at once.

        Args:
          x_BJTD: normalised input.
          window: state before the first segment.
          segments: borders and padding.
          always: rows that all tokens see; batch 1 where they are the same for all.
        Returns:
          Output, queries, keys and values of the J segments, and the window after the last one.
        """
        asked, window = self.project(x_BJTD, window, segments)
        return self.meet(asked, always), window

    def project(
        self, x_BJTD: Float[Array, "B J T D"], window: Window | None, segments: Segments
    ) -> tuple[Asked, Window | None]:
        """Queries, keys and values of J segments, with the window before each, and the window after the last one."""
        q_BJTHK = self.q(x_BJTD)
        k_BJTGK, v_BJTGK = self.kv(x_BJTD)
        past, window = self._windows(k_BJTGK, v_BJTGK, window, segments)
        rotated_BJTGK = rotate(k_BJTGK, jnp.arange(x_BJTD.shape[2]), self.frequencies)
        return Asked(q_BJTHK, rotated_BJTGK, v_BJTGK, segments.valid, segments.document, past), window

    def meet(self, asked: Asked, always: Beside | None = None, own: Beside | None = None) -> Attended:
        """Attends within each segment.

        Args:
          asked: one or several segments.
          always: rows that all tokens of a segment see; batch 1 where they are the same for all.
          own: a row per token, which that token and those after it see as they see the token. One segment only.
        """
        lead = asked.valid.shape[:-1]
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(lead) :]), asked)
        # Each device attends for its own tokens, to the keys of all.
        flat = flat._replace(k=_whole(flat.k), v=_whole(flat.v))
        own = None if own is None else Beside(_whole(own.k), _whole(own.v))
        R, T = flat.valid.shape
        q = constrain(rotate(flat.q, jnp.arange(T), self.frequencies), ("batch", "time", "heads", "head"))
        rows = None if always is None else Beside(*(jnp.broadcast_to(a, (R, *a.shape[1:])) for a in always))
        if self._fused(flat, rows, own):
            y = self._splash(q, flat, rows)
        elif not self.has_window and flat.document is None and own is None and (rows is None or parts("time") == 1):
            y = _causal(q, flat.k, flat.v, flat.valid, rows)
        else:
            k, v, mask_RTS = self._past_and_segment(flat)
            if own is not None:
                k, v = jnp.concatenate([k, own.k], axis=1), jnp.concatenate([v, own.v], axis=1)
                mask_RTS = jnp.concatenate([mask_RTS, mask_RTS[:, :, -T:]], axis=2)
            if rows is not None:
                k, v = jnp.concatenate([rows.k, k], axis=1), jnp.concatenate([rows.v, v], axis=1)
                mask_RTS = jnp.pad(mask_RTS, ((0, 0), (0, 0), (rows.k.shape[1], 0)), constant_values=True)
            y = attend(q, k, v, mask_RTS[:, None])
        y = constrain(y, ("batch", "time", "heads", "head"))
        return Attended(self.o(y.reshape(asked.q.shape)), asked.q, asked.k, asked.v)

    def _fused(self, flat: Asked, rows: Beside | None, own: Beside | None) -> bool:
        """Whether the TPU kernel does this."""
        kernel, packed = self.decoder.attention_kernel, flat.document is not None
        always, window = rows is not None, self.has_window
        why_not = obstacle(flat.valid.shape[1], flat.q.dtype, always, own is not None, window, packed)
        if kernel == "splash" and why_not is not None:
            raise ValueError(f"decoder.attention_kernel='splash' {why_not}; set it to 'auto' or 'plain'")
        return why_not is None and (kernel == "splash" or (kernel == "auto" and platform() == "tpu"))

    def _splash(self, q: Array, flat: Asked, rows: Beside | None) -> Float[Array, "R T H K"]:
        """Attention through the TPU kernel: what `meet` says, in blocks that stay on the chip."""
        document = jnp.zeros(flat.valid.shape, jnp.int32) if flat.document is None else flat.document
        k, v, ids = flat.k, flat.v, jnp.where(flat.valid, document, PADDING)
        if flat.past is not None:
            # What came before the segment belongs to its first document.
            seen = flat.past.valid & ~flat.past.fresh[:, None]
            past = rotate(flat.past.k, jnp.arange(-self.window_keys, 0), self.frequencies)
            k, v = jnp.concatenate([past, k], axis=1), jnp.concatenate([flat.past.v, v], axis=1)
            ids = jnp.concatenate([jnp.where(seen, 0, PADDING), ids], axis=1)
        if rows is not None:
            k, v = jnp.concatenate([rows.k, k], axis=1), jnp.concatenate([rows.v, v], axis=1)
            ids = jnp.pad(ids, ((0, 0), (rows.k.shape[1], 0)))
        window = self.window_keys if self.has_window else None
        return splash_attend(q, k, v, document, ids, window, interpret=platform() != "tpu")

    def _past_and_segment(self, flat: Asked) -> tuple[Array, Array, Bool[Array, "R T S"]]:
        """Keys and values of the window and the segment, and who sees whom."""
        R, T = flat.valid.shape
        k, v, seen, document, W = flat.k, flat.v, flat.valid, flat.document, 0
        if flat.past is not None:
            W = self.window_keys
            k = jnp.concatenate([rotate(flat.past.k, jnp.arange(-W, 0), self.frequencies), k], axis=1)
            v = jnp.concatenate([flat.past.v, v], axis=1)
            seen = jnp.concatenate([flat.past.valid & ~flat.past.fresh[:, None], seen], axis=1)
        mask_RTS = self._mask(jnp.broadcast_to(jnp.arange(T), (R, T)), seen)
        if document is not None:
            # What came before the segment belongs to its first document.
            keys = jnp.pad(document, ((0, 0), (W, 0)))
            mask_RTS = mask_RTS & (document[:, :, None] == keys[:, None, :])
        return k, v, mask_RTS

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
        behind = jnp.full(x_BND.shape[1], valid_BT.shape[1])
        k_BNGK, v_BNGK = self.kv(x_BND)
        rows = Keys(rotate(k_BNGK, behind, self.frequencies), v_BNGK)
        q_BNHK = rotate(self.q(x_BND), behind, self.frequencies)
        return self.o(attend_behind(q_BNHK, Keys(k_BTGK, v_BTGK), valid_BT, rows))

    def _mask(self, position_BT: Int[Array, "B T"], seen_BS: Bool[Array, "B S"]) -> Bool[Array, "B T S"]:
        """Keys stand at -W .. T-1; a query sees itself and those before it, the last W of them if there is a window."""
        key_11S = (jnp.arange(seen_BS.shape[1]) - self.window_keys)[None, None, :]
        query_BT1 = position_BT[:, :, None]
        mask_BTS = (key_11S <= query_BT1) & seen_BS[:, None, :]
        return mask_BTS & (key_11S >= query_BT1 - self.window_keys) if self.has_window else mask_BTS

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

    def open(
        self,
        window: Window | None,
        batch: int,
        segment_tokens: int,
        always: Beside | None = None,
        with_own: bool = False,
    ) -> OpenAttention:
        """Begins a segment that arrives in pieces; see `meet` for what else its tokens see."""
        shape = (batch, segment_tokens, self.decoder.num_kv_heads, self.decoder.head_dim)
        zeros = jnp.zeros(shape, jnp.dtype(self.precision.compute))
        if always is not None:
            always = Beside(*(jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in always))
        return OpenAttention(zeros, zeros, window, always, Beside(zeros, zeros) if with_own else None)

    def extend(
        self,
        x_BSD: Float[Array, "B S D"],
        position_BS: Int[Array, "B S"],
        slot_BS: Int[Array, "B S"],
        state: OpenAttention,
        own: Beside | None = None,
    ) -> tuple[Attended, OpenAttention]:
        """Attends from S new tokens to all of their segment so far.

        Args:
          x_BSD: normalised input.
          position_BS: positions within the segment.
          slot_BS: where their keys are kept: the position, or T and more for tokens that do not count.
          state: keys and values so far.
          own: the rows of the new tokens, if the segment was opened with such.
        Returns:
          Output, queries, keys and values of the S tokens, and the state with the new keys.
        """
        q_BSHK = self.q(x_BSD)
        k_BSGK, v_BSGK = self.kv(x_BSD)
        rows = jnp.arange(x_BSD.shape[0])[:, None]
        k_BSGK = rotate(k_BSGK, position_BS, self.frequencies)

        def kept(buffer: Array, new: Array) -> Array:
            return buffer.at[rows, slot_BS].set(new, mode="drop")

        state = state._replace(k=kept(state.k, k_BSGK), v=kept(state.v, v_BSGK))
        if own is not None:
            assert state.own is not None
            state = state._replace(own=Beside(kept(state.own.k, own.k), kept(state.own.v, own.v)))
        k, v, mask_BSS = self._seen(position_BS, state)
        y_BSHK = attend(rotate(q_BSHK, position_BS, self.frequencies), k, v, mask_BSS[:, None])
        return Attended(self.o(y_BSHK), q_BSHK, k_BSGK, v_BSGK), state

    def _seen(self, position_BS: Int[Array, "B S"], state: OpenAttention) -> tuple[Array, Array, Array]:
        """All keys and values of an open segment, and which of them tokens at these positions see."""
        k, v, T = state.k, state.v, state.k.shape[1]
        seen = jnp.ones(k.shape[:2], bool)  # later positions are masked by causality
        if state.window is not None:
            W, window = self.window_keys, state.window
            k = jnp.concatenate([rotate(window.k, jnp.arange(-W, 0), self.frequencies), k], axis=1)
            v = jnp.concatenate([window.v, v], axis=1)
            seen = jnp.concatenate([window.valid & ~window.fresh[:, None], seen], axis=1)
        mask = self._mask(position_BS, seen)
        if state.own is not None:
            k, v = jnp.concatenate([k, state.own.k], axis=1), jnp.concatenate([v, state.own.v], axis=1)
            mask = jnp.concatenate([mask, mask[:, :, -T:]], axis=2)
        if state.always is not None:
            k, v = jnp.concatenate([state.always.k, k], axis=1), jnp.concatenate([state.always.v, v], axis=1)
            mask = jnp.pad(mask, ((0, 0), (0, 0), (state.always.k.shape[1], 0)), constant_values=True)
        return k, v, mask

    def close(self, state: OpenAttention) -> Window | None:
        """The window after a full segment."""
        if state.window is None:
            return None
        W, T = self.window_keys, state.k.shape[1]
        k = rotate(state.k[:, T - W :], -jnp.arange(T - W, T), self.frequencies)
        rows = jnp.ones(k.shape[:2], bool)
        return Window(k, state.v[:, T - W :], rows, jnp.zeros_like(state.window.fresh))


def _whole(keys: Float[Array, "R S G K"]) -> Float[Array, "R S G K"]:
    """Keys or values of all tokens on each device."""
    return constrain(keys, ("batch", None, "kv_heads", "head"))


def _causal(q: Array, k: Array, v: Array, valid_RT: Bool[Array, "R T"], rows: Beside | None) -> Array:
    """Attention of segments to themselves and to rows before them, without a T x T mask.

    As many queries as there are rows stand before the others, so that causality is all that the mask has to say;
    what they see is thrown away. Not where tokens are split: with more queries, devices would have uneven parts.
    """
    if rows is None:
        return attend(q, k, v, valid_RT[:, None, None, :], causal=True)
    N = rows.k.shape[1]
    q = jnp.pad(q, ((0, 0), (N, 0), (0, 0), (0, 0)))
    k, v = jnp.concatenate([rows.k, k], axis=1), jnp.concatenate([rows.v, v], axis=1)
    valid = jnp.pad(valid_RT, ((0, 0), (N, 0)), constant_values=True)
    return attend(q, k, v, valid[:, None, None, :], causal=True)[:, N:]
