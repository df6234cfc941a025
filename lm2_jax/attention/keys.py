"""Keys and queries with what decides who sees whom."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lm2_jax.types import Array, Bool, Float, Int


class Queries(NamedTuple):
    """Queries of one segment per row, rotated."""

    q: Float[Array, "R T H K"]
    position: Int[Array, "R T"] | None = None  # None: query i is at position i
    document: Int[Array, "R T"] | None = None


class Keys(NamedTuple):
    """Rotated keys and their values.

    A query at position p sees a key at position s if the key is valid, both are of the same document, s <= p, and,
    with a window of W tokens, s > p - W; and p < `until` where that is given. Every query sees keys without positions:
    a prefix.
    """

    k: Float[Array, "R S G K"]
    v: Float[Array, "R S G K"]
    position: np.ndarray | Int[Array, " S"] | None = None
    valid: Bool[Array, "R S"] | None = None
    document: Int[Array, "R S"] | None = None
    until: Int[Array, " S"] | None = None


def visible(queries: Queries, keys: Keys, window_tokens: int | None) -> Bool[Array, "R T S"]:
    """Which query sees which key; see `Keys`."""
    (R, T), S = queries.q.shape[:2], keys.k.shape[1]
    if keys.position is None:
        return jnp.ones((R, T, S), bool)
    query_RT1 = jnp.broadcast_to(jnp.arange(T), (R, T))[:, :, None]
    if queries.position is not None:
        query_RT1 = queries.position[:, :, None]
    key_11S = jnp.asarray(keys.position)[None, None]
    mask_RTS = key_11S <= query_RT1
    if window_tokens is not None:
        mask_RTS = mask_RTS & (key_11S > query_RT1 - window_tokens)
    if keys.until is not None:
        mask_RTS = mask_RTS & (query_RT1 < keys.until[None, None])
    if keys.valid is not None:
        mask_RTS = mask_RTS & keys.valid[:, None]
    if queries.document is not None and keys.document is not None:
        mask_RTS = mask_RTS & (queries.document[:, :, None] == keys.document[:, None])
    return mask_RTS


def joined(sets: Sequence[Keys]) -> tuple[Array, Array]:
    """Keys and values of all sets, one set after the other."""
    return jnp.concatenate([s.k for s in sets], axis=1), jnp.concatenate([s.v for s in sets], axis=1)
