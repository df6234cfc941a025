"""How a segment attends: one function over several implementations."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from lm2_jax.attention import splash
from lm2_jax.attention.keys import Keys, Queries, joined, visible
from lm2_jax.attention.softmax import dot_product_attention
from lm2_jax.partition import num_shards
from lm2_jax.types import Array, Float


class Backend(NamedTuple):
    """One implementation of attention."""

    unsupported: Callable[[Queries, Sequence[Keys], int | None], str | None]  # the reason as a clause, or None
    attend: Callable[[Queries, Sequence[Keys], int | None], Float[Array, "R T H K"]]


def attend(
    queries: Queries, sets: Sequence[Keys], window_tokens: int | None, kernel: str = "auto"
) -> Float[Array, "R T H K"]:
    """Grouped-query softmax attention of each query to all keys that it sees.

    Args:
      queries: of R segments.
      sets: keys in groups, each with its own rule of visibility; a prefix comes first.
      window_tokens: keys that a query sees at most, its own included; None: all.
      kernel: a name in `BACKENDS`, or "auto": the fastest that supports these arguments on this platform.
    Returns:
      The weighted values per head, not yet merged.
    Raises:
      ValueError: the kernel was asked for by name and does not support this.
    """
    if kernel == "auto":
        kernel = FASTEST.get(splash.platform(), "plain")
        if BACKENDS[kernel].unsupported(queries, sets, window_tokens) is not None:
            kernel = "plain"
    reason = BACKENDS[kernel].unsupported(queries, sets, window_tokens)
    if reason is not None:
        raise ValueError(f"decoder.attention_kernel={kernel!r} {reason}; set it to 'auto' or 'plain'")
    return BACKENDS[kernel].attend(queries, sets, window_tokens)


def _plain(queries: Queries, sets: Sequence[Keys], window_tokens: int | None, implementation: Any = None) -> Array:
    """Through `jax.nn.dot_product_attention`."""
    prefix = [s for s in sets if s.position is None]
    is_segment = queries.position is None and queries.document is None and len(sets) - len(prefix) == 1
    if is_segment and window_tokens is None and (not prefix or num_shards("time") == 1):
        return _causal(queries.q, prefix, sets[-1], implementation)
    k, v = joined(sets)
    mask_RTS = jnp.concatenate([visible(queries, s, window_tokens) for s in sets], axis=2)
    return dot_product_attention(queries.q, k, v, mask_RTS[:, None], implementation=implementation)


def _causal(q: Array, prefix: Sequence[Keys], tokens: Keys, implementation: Any) -> Array:
    """Attention of segments to a prefix and to themselves, without a mask of T x T.

    One query per prefix key is added in front, so that causality is all the mask has to express; the outputs of these
    queries are dropped. It is not used where tokens are sharded: the shards would become uneven.
    """
    k, v = joined([*prefix, tokens])
    N = k.shape[1] - tokens.k.shape[1]
    valid = jnp.ones(tokens.k.shape[:2], bool) if tokens.valid is None else tokens.valid
    valid = jnp.pad(valid, ((0, 0), (N, 0)), constant_values=True)
    q = jnp.pad(q, ((0, 0), (N, 0), (0, 0), (0, 0)))
    return dot_product_attention(q, k, v, valid[:, None, None], causal=True, implementation=implementation)[:, N:]


def _cudnn_unsupported(queries: Queries, sets: Sequence[Keys], window_tokens: int | None) -> str | None:
    """What cuDNN's fused attention does not take."""
    if splash.platform() not in ("gpu", "cuda"):
        return f"needs an NVIDIA GPU, this runs on {splash.platform()!r}"
    if queries.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16, but precision.compute is {queries.q.dtype}"
    return (
        None
        if queries.q.shape[-1] % 8 == 0
        else f"takes a head width that is a multiple of 8, got {queries.q.shape[-1]}"
    )


def _cudnn(queries: Queries, sets: Sequence[Keys], window_tokens: int | None) -> Array:
    return _plain(queries, sets, window_tokens, "cudnn")


BACKENDS = {
    "plain": Backend(lambda *_: None, _plain),
    "splash": Backend(splash.unsupported, splash.attend_sets),
    "cudnn": Backend(_cudnn_unsupported, _cudnn),
}
FASTEST = {"tpu": "splash"}  # where it supports the arguments; cuDNN is used only where it is asked for
