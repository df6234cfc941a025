"""The attention layer of a decoder block: projections, the window carried across segments, and what tokens see."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm2_jax.attention import backends
from lm2_jax.attention.keys import Keys, Queries
from lm2_jax.attention.softmax import ExtraKV, attend_from_end
from lm2_jax.decoder import DecoderConfig
from lm2_jax.layers import Einsum, constrain, rope_frequencies, rotate
from lm2_jax.precision import Precision
from lm2_jax.state import Segments, reset_rows, select_rows, stop_where
from lm2_jax.types import Array, Bool, Float, Int


class Window(NamedTuple):
    """The last W keys and values of a segment, unrotated: in the next segment their positions are -W .. -1."""

    k: Float[Array, "B *J W G K"]
    v: Float[Array, "B *J W G K"]
    valid: Bool[Array, "B *J W"]
    is_start: Bool[Array, "*rows"]


WINDOW_AXES: Any = Window(
    k=("batch", "window", "kv_heads", "head"),  # pyright: ignore[reportArgumentType]
    v=("batch", "window", "kv_heads", "head"),  # pyright: ignore[reportArgumentType]
    valid=("batch", "window"),  # pyright: ignore[reportArgumentType]
    is_start=("batch",),  # pyright: ignore[reportArgumentType]
)


class SegmentKV(NamedTuple):
    """Keys and values that the tokens of a segment may see."""

    k: Float[Array, "B *J T G K"]  # rotated
    v: Float[Array, "B *J T G K"]
    valid: Bool[Array, "B *J T"] | None = None  # None: all
    document: Int[Array, "B *J T"] | None = None
    past: Window | None = None  # the window before each segment


class Projected(NamedTuple):
    """Tokens, projected but not yet attended; leading dimensions B and J, or B for one segment."""

    q: Float[Array, "B *J S H K"]  # unrotated
    kv: SegmentKV


class Attention(nn.Module):
    """Grouped-query attention with RoPE; positions count from the segment's start."""

    decoder: DecoderConfig
    precision: Precision

    def setup(self) -> None:
        d = self.decoder
        D, H, G, K = d.width, d.num_heads, d.num_kv_heads, d.head_dim
        q, k, v, o = ({"adapter": d.lora.adapter(f"attention/{name}_proj")} for name in "qkvo")
        self.q_proj = Einsum((D, H, K), ("embed", "heads", "head"), self.precision, **q)
        self.k_proj = Einsum((D, G, K), ("embed", "kv_heads", "head"), self.precision, **k)
        self.v_proj = Einsum((D, G, K), ("embed", "kv_heads", "head"), self.precision, **v)
        self.o_proj = Einsum((H, K, D), ("heads", "head", "embed"), self.precision, in_dims=2, **o)

    @functools.cached_property
    def frequencies(self) -> np.ndarray:
        """Radians per position."""
        return rope_frequencies(self.decoder.head_dim, self.decoder.rope_theta, self.decoder.rope_scaling)

    @property
    def window_keys(self) -> int:
        """Keys W carried into the next segment; 0 without a window, and with one that holds only the token itself."""
        return (self.decoder.window_tokens or 1) - 1

    def init_window(self, batch: int) -> Window | None:
        """An empty window, or None where attention stays in its segment."""
        if self.window_keys == 0:
            return None
        shape = (batch, self.window_keys, self.decoder.num_kv_heads, self.decoder.head_dim)
        zeros = jnp.zeros(shape, jnp.dtype(self.precision.compute))
        return Window(zeros, zeros, jnp.zeros(shape[:2], bool), jnp.ones(batch, bool))

    def init_keys(self, batch: int, tokens: int) -> ExtraKV:
        """Space for the keys and values of a segment that arrives in pieces."""
        shape = (batch, tokens, self.decoder.num_kv_heads, self.decoder.head_dim)
        return ExtraKV(*[jnp.zeros(shape, jnp.dtype(self.precision.compute))] * 2)

    def q(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead H K"]:
        """Queries, unrotated."""
        return self.q_proj("...d,dhk->...hk", x)

    def kv(self, x: Float[Array, "*lead D"], position: Int[Array, "..."] | None = None) -> ExtraKV:
        """Keys and values of normalised rows; keys are rotated to `position`, or not at all.

        An unrotated key is at position 0, the segment's start: a query's own position then changes the scores of all
        such keys alike, whatever number of segments came before.
        """
        k = self.k_proj("...d,dgk->...gk", x)
        return ExtraKV(
            k if position is None else rotate(k, position, self.frequencies), self.v_proj("...d,dgk->...gk", x)
        )

    def output(self, heads: Float[Array, "*lead H K"]) -> Float[Array, "*lead D"]:
        """Merges the heads."""
        return self.o_proj("...hk,hkd->...d", heads)

    def project(
        self, x_BJTD: Float[Array, "B J T D"], window: Window | None, segments: Segments
    ) -> tuple[Projected, Window | None]:
        """Queries, keys and values of J full segments, and the window after the last one."""
        k_BJTGK, v_BJTGK = self.kv(x_BJTD)
        past, window = self._windows(k_BJTGK, v_BJTGK, window, segments)
        rotated_BJTGK = rotate(k_BJTGK, jnp.arange(x_BJTD.shape[2]), self.frequencies)
        kv = SegmentKV(rotated_BJTGK, v_BJTGK, segments.valid, segments.document, past)
        return Projected(self.q(x_BJTD), kv), window

    def attend(
        self,
        projected: Projected,
        prefix: ExtraKV | None = None,
        own: ExtraKV | None = None,
        position_BS: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B *J S H K"]:
        """Attends within each segment; `output` merges the heads.

        Args:
          projected: of one segment or several.
          prefix: rows that every token sees; batch 1 where they are the same for all.
          own: one row per token, which that token and those after it see as they see the token.
          position_BS: positions of the queries, where they are a piece of a segment; None: full segments.
        """
        q, kv = projected
        lead, whole = q.shape[:-3], position_BS is None
        q, kv, own = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(lead) :]), (q, kv, own))
        (R, S), T = q.shape[:2], kv.k.shape[1]
        q = rotate(q, jnp.arange(S) if position_BS is None else position_BS, self.frequencies)
        q = constrain(q, ("batch", "time", "heads", "head")) if whole else q
        sets = []
        if prefix is not None:
            k, v = (jnp.broadcast_to(a, (R, *a.shape[1:])) for a in prefix)
            sets.append(Keys(k, v))
        if kv.past is not None:
            W, past = self.window_keys, kv.past
            # What came before the segment belongs to its first document.
            document = None if kv.document is None else jnp.zeros((R, W), jnp.int32)
            k = rotate(past.k, jnp.arange(-W, 0), self.frequencies)
            sets.append(Keys(k, past.v, np.arange(-W, 0), past.valid & ~past.is_start[:, None], document))
        for k, v in [(kv.k, kv.v)] + ([tuple(own)] if own is not None else []):
            k, v = (_on_each_device(k), _on_each_device(v)) if whole else (k, v)
            sets.append(Keys(k, v, np.arange(T), kv.valid, kv.document))
        kernel = self.decoder.attention_kernel if whole else "plain"
        y = backends.attend(Queries(q, position_BS, kv.document), sets, self.decoder.window_tokens, kernel)
        y = constrain(y, ("batch", "time", "heads", "head")) if whole else y
        return y.reshape(projected.q.shape)

    def from_end(
        self, x_BND: Float[Array, "B N D"], kv: ExtraKV, valid_BT: Bool[Array, "B T"]
    ) -> Float[Array, "B N D"]:
        """Rows at one position after the segment attend to it and to each other, in one softmax.

        Args:
          x_BND: normalised rows.
          kv: rotated keys and values of the segment.
          valid_BT: true for tokens, false for padding.
        """
        end_N = jnp.full(x_BND.shape[1], valid_BT.shape[1])
        q_BNHK = rotate(self.q(x_BND), end_N, self.frequencies)
        return self.output(attend_from_end(q_BNHK, kv, valid_BT, self.kv(x_BND, end_N)))

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
            last, none = Window(k, v, valid, jnp.zeros_like(reset)), jax.tree.map(jnp.zeros_like, window)
            after = select_rows(any_valid, last, window, WINDOW_AXES)
            return after, select_rows(any_valid, window, none, WINDOW_AXES)  # rows of padding see no window

        per_segment = (k_BJWGK, v_BJWGK, valid_BJW, segments.valid.any(axis=2), segments.reset)
        inputs = (*(jnp.moveaxis(a, 1, 0) for a in per_segment), segments.cut)
        window, before = jax.lax.scan(step, window, inputs)
        return Window(*(jnp.moveaxis(a, 0, 1) for a in before)), window

    def last_window(self, kv: ExtraKV, window: Window | None) -> Window | None:
        """The window after a segment that arrived in pieces, from its rotated keys; `window` is the one before it."""
        if window is None:
            return None
        W, T = self.window_keys, kv.k.shape[1]
        k = rotate(kv.k[:, T - W :], -jnp.arange(T - W, T), self.frequencies)
        return Window(k, kv.v[:, T - W :], jnp.ones(k.shape[:2], bool), jnp.zeros_like(window.is_start))


def _on_each_device(keys: Float[Array, "R S G K"]) -> Float[Array, "R S G K"]:
    """Keys or values of all tokens: each device attends from its own tokens to the keys of all."""
    return constrain(keys, ("batch", None, "kv_heads", "head"))
