"""The attention layer of a decoder block: projections, the window carried across segments, and what tokens see."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm2_jax.attention import backends
from lm2_jax.attention.cache import (
    CACHE_AXES,
    Cache,
    append,
    append_segment,
    empty_cache,
    next_block,
    settle,
    span_of,
    visible_cache,
)
from lm2_jax.attention.keys import Keys, Queries
from lm2_jax.attention.softmax import ExtraKV, attend_from_end
from lm2_jax.decoder import DecoderConfig
from lm2_jax.layers import Einsum, RMSNorm, constrain, rotate
from lm2_jax.precision import Precision
from lm2_jax.rope import rope_frequencies
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


def window_axes(decoder: DecoderConfig) -> Any:
    """Logical axes of `Attention.init_window`."""
    if decoder.max_tokens is not None:
        return CACHE_AXES
    return WINDOW_AXES if (decoder.window_tokens or 1) > 1 else None


class SegmentKV(NamedTuple):
    """Keys and values that the tokens of a segment may see."""

    k: Float[Array, "B *J T G K"]  # rotated
    v: Float[Array, "B *J T G K"]
    valid: Bool[Array, "B *J T"] | None = None  # None: all
    document: Int[Array, "B *J T"] | None = None
    past: Window | Cache | None = None  # the window before each segment, or the cache before all
    position: Int[Array, "B *J T"] | None = None  # with a cache, of the queries in their document
    cut: Bool[Array, " J"] | None = None  # with a cache, where truncated backpropagation cuts


class Projected(NamedTuple):
    """Tokens, projected but not yet attended; leading dimensions B and J, or B for one segment."""

    q: Float[Array, "B *J S H K"]  # unrotated
    kv: SegmentKV


class Attention(nn.Module):
    """Grouped-query attention with RoPE; positions count from the segment's start, with a cache from the document's."""

    decoder: DecoderConfig
    precision: Precision
    mutual: tuple[tuple[int, int], ...] = ()
    """Ranges of positions, first and after the last, whose rows see each other; all rows see those before them."""

    def setup(self) -> None:
        d = self.decoder
        D, H, G, K = d.width, d.num_heads, d.num_kv_heads, d.head_dim
        q, k, v, o = (d.lora.adapter(f"attention/{name}_proj") for name in "qkvo")
        has_bias, precision = d.attention_bias != "none", self.precision
        self.q_proj = Einsum((D, H, K), ("embed", "heads", "head"), precision, adapter=q, bias=has_bias)
        self.k_proj = Einsum((D, G, K), ("embed", "kv_heads", "head"), precision, adapter=k, bias=has_bias)
        self.v_proj = Einsum((D, G, K), ("embed", "kv_heads", "head"), precision, adapter=v, bias=has_bias)
        shape, axes, has_bias = (H, K, D), ("heads", "head", "embed"), d.attention_bias == "qkvo"
        self.o_proj = Einsum(shape, axes, precision, in_dims=2, adapter=o, bias=has_bias)
        if d.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(self.precision, d.norm_epsilon) for _ in range(2))

    @functools.cached_property
    def frequencies(self) -> np.ndarray | None:
        """Radians per position of RoPE; None with learned positions."""
        d = self.decoder
        return None if d.max_positions else rope_frequencies(d.head_dim, d.rope_theta, d.rope_scaling)

    def order(self, position: Any) -> Any:
        """The number by which a row at a position sees another: that of the other's must not be above its own."""
        for first, end in self.mutual:
            position = jnp.where((position >= first) & (position < end), end - 1, position)
        return position

    @property
    def window_keys(self) -> int:
        """Keys W carried into the next segment; 0 without a window, and with one that holds only the token itself."""
        return (self.decoder.window_tokens or 1) - 1

    def init_window(self, batch: int) -> Window | Cache | None:
        """An empty window or cache, or None where attention stays in its segment."""
        d, dtype = self.decoder, jnp.dtype(self.precision.compute)
        if d.max_tokens is not None:
            return empty_cache(batch, d.max_tokens, d.num_kv_heads, d.head_dim, dtype)
        if self.window_keys == 0:
            return None
        shape = (batch, self.window_keys, d.num_kv_heads, d.head_dim)
        zeros = jnp.zeros(shape, dtype)
        return Window(zeros, zeros, jnp.zeros(shape[:2], bool), jnp.ones(batch, bool))

    def init_keys(self, batch: int, tokens: int) -> ExtraKV:
        """Space for the keys and values of a segment that arrives in pieces."""
        shape = (batch, tokens, self.decoder.num_kv_heads, self.decoder.head_dim)
        return ExtraKV(*[jnp.zeros(shape, jnp.dtype(self.precision.compute))] * 2)

    def q(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead H K"]:
        """Queries, unrotated."""
        q = self.q_proj("...d,dhk->...hk", x)
        return self.q_norm(q) if self.decoder.qk_norm else q

    def turned(self, q: Float[Array, "*lead H K"], position: Int[Array, "..."]) -> Float[Array, "*lead H K"]:
        """Queries rotated to their positions, as scores need them.

        A scaling that multiplies queries and keys is applied to the queries alone, squared: keys are also rotated
        back, and rows at position 0 are not rotated at all.
        """
        q, scaling = rotate(q, position, self.frequencies), self.decoder.rope_scaling
        return q if scaling is None or scaling.score_factor == 1.0 else q * scaling.score_factor

    def kv(self, x: Float[Array, "*lead D"], position: Int[Array, "..."] | None = None) -> ExtraKV:
        """Keys and values of normalised rows; keys are rotated to `position`, or not at all.

        An unrotated key is at position 0, the segment's start: a query's own position then changes the scores of all
        such keys alike, whatever number of segments came before.
        """
        k, v = self.k_proj("...d,dgk->...gk", x), self.v_proj("...d,dgk->...gk", x)
        k = self.k_norm(k) if self.decoder.qk_norm else k
        if position is None:
            return ExtraKV(k, v)
        k, max_tokens = rotate(k, position, self.frequencies), self.decoder.max_tokens
        if max_tokens is not None:  # what comes after the limit is NaN, and must not reach what is before it
            k, v = (jnp.where((position < max_tokens)[..., None, None], a, 0) for a in (k, v))
        return ExtraKV(k, v)

    def output(self, heads: Float[Array, "*lead H K"]) -> Float[Array, "*lead D"]:
        """Merges the heads."""
        return self.o_proj("...hk,hkd->...d", heads)

    def project(
        self, x_BJTD: Float[Array, "B J T D"], window: Window | Cache | None, segments: Segments
    ) -> tuple[Projected, Window | Cache | None]:
        """Queries, keys and values of J full segments, and the window or cache after the last one."""
        if isinstance(window, Cache):
            return self._project_cached(x_BJTD, window, segments)
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
        """Attends within each segment, or with a cache to the document so far; `output` merges the heads.

        Args:
          projected: of one segment or several.
          prefix: rows that every token sees; batch 1 where they are the same for all.
          own: one row per token, which that token and those after it see as they see the token.
          position_BS: positions of the queries, where they are a piece of a segment; None: full segments.
        """
        q, kv = projected
        if isinstance(kv.past, Cache):
            return self._attend_cached(projected, kv.past, prefix, position_BS)
        lead, is_full = q.shape[:-3], position_BS is None
        q, kv, own = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(lead) :]), (q, kv, own))
        (R, S), T = q.shape[:2], kv.k.shape[1]
        q = self.turned(q, jnp.arange(S) if position_BS is None else position_BS)
        q = constrain(q, ("batch", "time", "heads", "head")) if is_full else q
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
            k, v = (_on_each_device(k), _on_each_device(v)) if is_full else (k, v)
            sets.append(Keys(k, v, self.order(np.arange(T)), kv.valid, kv.document))
        kernel = self.decoder.attention_kernel if is_full else "plain"
        if self.mutual:
            position_BS = jnp.broadcast_to(jnp.arange(S), (R, S)) if is_full else position_BS
            position_BS = self.order(position_BS)
        y = backends.attend(Queries(q, position_BS, kv.document), sets, self.decoder.window_tokens, kernel)
        y = constrain(y, ("batch", "time", "heads", "head")) if is_full else y
        return y.reshape(projected.q.shape)

    def _project_cached(
        self, x_BJTD: Float[Array, "B J T D"], cache: Cache, segments: Segments
    ) -> tuple[Projected, Cache]:
        """As `project`: keys at their positions in the document."""
        span = span_of(cache, segments)
        k_BJTGK, v_BJTGK = self.kv(x_BJTD, span.position)
        past = visible_cache(cache, segments)
        kv = SegmentKV(k_BJTGK, v_BJTGK, segments.valid, span.document, past, span.position, segments.cut)
        flat = _flat(SegmentKV(k_BJTGK, v_BJTGK, segments.valid))
        return Projected(self.q(x_BJTD), kv), append(cache, flat.k, flat.v, flat.valid, span)

    def _attend_cached(
        self, projected: Projected, past: Cache, prefix: ExtraKV | None, position_BS: Int[Array, "B S"] | None
    ) -> Float[Array, "B *J S H K"]:
        """All segments of a call, or a piece of one, attend to the cache and to what is before them in the call."""
        kv, is_full = projected.kv._replace(past=None, cut=None), position_BS is None
        max_tokens = self.decoder.max_tokens
        assert max_tokens is not None
        q = projected.q
        q, kv = (_flat(q), _flat(kv)) if is_full else (q, kv)
        position = kv.position
        assert position is not None
        q = self.turned(q, position)
        q = constrain(q, ("batch", "time", "heads", "head")) if is_full else q
        (B, places), T = past.valid.shape, projected.kv.k.shape[-3]
        zero_BM = None if kv.document is None else jnp.zeros((B, places), jnp.int32)
        sets = [Keys(*(jnp.broadcast_to(a, (B, *a.shape[1:])) for a in prefix))] if prefix is not None else []
        is_seen_BM = past.valid & ~past.is_start[:, None]
        sets.append(Keys(past.k, past.v, np.arange(-places, 0), is_seen_BM, zero_BM))
        k, v = (_on_each_device(kv.k), _on_each_device(kv.v)) if is_full else (kv.k, kv.v)
        tokens = Keys(k, v, np.arange(k.shape[1]), kv.valid, kv.document)
        kernel, cut_J = self.decoder.attention_kernel if is_full else "plain", projected.kv.cut
        if cut_J is None or not is_full or len(cut_J) == 1:
            sets.append(tokens)
        else:  # a query sees the keys of blocks before its own without a gradient
            kernel = "plain"
            until_S = jnp.repeat(next_block(cut_J) * T, T)
            k, v = jax.lax.stop_gradient((k, v))
            sets += [tokens._replace(until=until_S), tokens._replace(k=k, v=v, position=until_S)]
        y = backends.attend(Queries(q, position_BS, kv.document), sets, None, kernel)
        y = settle(y, position, kv.valid, max_tokens)
        y = constrain(y, ("batch", "time", "heads", "head")) if is_full else y
        return y.reshape(projected.q.shape)

    def first_position(self, window: Window | Cache | None, segment_tokens: int) -> Int[Array, " B"] | int:
        """The position of a segment's first token; not 0 where a cache says how many segments are before it."""
        return window.used_segments * segment_tokens if isinstance(window, Cache) else 0

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
        q_BNHK = self.turned(self.q(x_BND), end_N)
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

        def step(window: Window, inputs: Any) -> tuple[Window, Window]:
            k, v, valid, any_valid, reset, cut = inputs
            window = stop_where(cut, reset_rows(window, reset, WINDOW_AXES))
            last, none = Window(k, v, valid, jnp.zeros_like(reset)), jax.tree.map(jnp.zeros_like, window)
            after = select_rows(any_valid, last, window, WINDOW_AXES)
            return after, select_rows(any_valid, window, none, WINDOW_AXES)  # rows of padding see no window

        per_segment = (k_BJWGK, v_BJWGK, valid_BJW, segments.valid.any(axis=2), segments.reset)
        inputs: Any = (*(jnp.moveaxis(a, 1, 0) for a in per_segment), segments.cut)
        window, before = jax.lax.scan(step, window, inputs)
        return Window(*(jnp.moveaxis(a, 0, 1) for a in before)), window

    def last_window(self, kv: ExtraKV, window: Window | Cache | None) -> Window | Cache | None:
        """The window after a segment that arrived in pieces, from its rotated keys; `window` is the one before it."""
        if window is None:
            return None
        if isinstance(window, Cache):
            return append_segment(window, kv.k, kv.v)
        W, T = self.window_keys, kv.k.shape[1]
        k = rotate(kv.k[:, T - W :], -jnp.arange(T - W, T), self.frequencies)
        return Window(k, kv.v[:, T - W :], jnp.ones(k.shape[:2], bool), jnp.zeros_like(window.is_start))


def _flat(tree: Any) -> Any:
    """[B J T ...] as [B J*T ...]: the segments of a row, one after the other."""
    return jax.tree.map(lambda a: a.reshape(len(a), -1, *a.shape[3:]), tree)


def _on_each_device(keys: Float[Array, "R S G K"]) -> Float[Array, "R S G K"]:
    """Keys or values of all tokens: each device attends from its own tokens to the keys of all."""
    return constrain(keys, ("batch", None, "kv_heads", "head"))
