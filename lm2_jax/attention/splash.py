"""Attention inside segments through the TPU kernel that skips what is masked (splash attention, part of jax)."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from lm2_jax.attention.keys import Keys, Queries, joined
from lm2_jax.partition import Shards, logical_shard_map, num_shards
from lm2_jax.types import Array, Float, Int

LANES = 128  # of a TPU's vector registers: what the kernel's blocks are multiples of
LONGEST_BLOCK = 512  # tokens whose scores are on the chip at once, in both directions
PADDING = -1  # a key that nobody sees


def platform() -> str:
    """What functions traced here will run on ("cpu", "gpu", "tpu"): the devices of the active layout, else jax's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def fits(tokens: int) -> bool:
    """Whether segments are long enough: the kernel takes full blocks of tokens, on each device that has a part."""
    return tokens % (LANES * num_shards("time")) == 0


def unsupported(queries: Queries, sets: Sequence[Keys], window_tokens: int | None) -> str | None:
    """Why the kernel cannot be used, as a clause after its name; None if it can."""
    T, dtype = queries.q.shape[1], queries.q.dtype
    prefix = any(s.position is None for s in sets)
    if dtype == jnp.float64:
        return "takes float32 and bfloat16, but precision.compute is float64"
    if queries.position is not None:
        return "takes full segments, not pieces of one"
    if sum(s.position is not None and s.position[0] == 0 for s in sets) > 1:
        return "takes no retrieved row per token, which join 'context' has with join.retrieve='tokens'"
    if prefix and (window_tokens is not None or queries.document is not None):
        other = "packed documents" if window_tokens is None else "an attention window (decoder.window_tokens)"
        return f"takes no persistent tokens and no rows of a memory (join.retrieve 'rows' or 'queries') with {other}"
    if not fits(T):
        return (
            f"takes a multiple of {LANES} tokens on each of {num_shards('time')} devices, got {T} in all "
            "(model.segment_tokens and the rows of join 'tokens' (twice memory.num_tokens) or 'recall' "
            "(memory.sensory_tokens + 2; in its second pass memory.summary_tokens + 2))"
        )
    return None


def attend_sets(queries: Queries, sets: Sequence[Keys], window_tokens: int | None) -> Float[Array, "R T H K"]:
    """`backends.attend` through the kernel: scores of a block stay on the chip."""
    R, T = queries.q.shape[:2]
    document = jnp.zeros((R, T), jnp.int32) if queries.document is None else queries.document
    ids = []
    for keys in sets:
        of_keys = jnp.zeros(keys.k.shape[:2], jnp.int32) if keys.document is None else keys.document
        ids.append(of_keys if keys.valid is None else jnp.where(keys.valid, of_keys, PADDING))
    k, v = joined(sets)
    window = None if window_tokens is None else window_tokens - 1
    interpret = platform() != "tpu"
    return splash_attend(queries.q, k, v, document, jnp.concatenate(ids, axis=1), window, interpret=interpret)


def splash_attend(
    q: Float[Array, "R T H K"],
    k: Float[Array, "R S G K"],
    v: Float[Array, "R S G K"],
    query_ids: Int[Array, "R T"],
    key_ids: Int[Array, "R S"],
    window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "R T H K"]:
    """Causal grouped-query attention; token i is at key S - T + i.

    A query sees keys up to its own place that have its number, and with a window the `window` keys before its own at
    most. The forward and the backward pass never hold a T x S array: blocks of scores stay on the chip, and blocks that
    are masked completely are skipped.

    Args:
      q: queries, rotated.
      k: keys, rotated; S - T of them stand before the segment.
      v: their values.
      query_ids: document that each query belongs to.
      key_ids: document of each key; `PADDING` for one that must not be seen.
      window: keys before its own that a query sees at most; None: all.
      interpret: runs the kernel as plain operations, on any machine and slowly.
    """
    T, S, K = q.shape[1], k.shape[1], q.shape[-1]
    padding = -S % LANES  # keys fill full blocks, with padding in front
    k, v = (jnp.pad(a, ((0, 0), (padding, 0), (0, 0), (0, 0))) for a in (k, v))
    key_ids = jnp.pad(key_ids, ((0, 0), (padding, 0)), constant_values=PADDING)
    shape = (T, S + padding)
    mask = masks.LocalMask(shape, (window, 0), offset=S + padding - T)
    kernel = _kernel(mask, q.shape[2], interpret)
    pieces, structure = jax.tree.flatten(kernel)
    share = _share(mask)
    names = [_piece_axes(piece) for piece in pieces]

    def attend(shards: Shards, pieces: Any, q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array) -> Array:
        attend_part = jax.tree.unflatten(structure, pieces)

        def row(q_THK: Array, k_SGK: Array, v_SGK: Array, query_ids_T: Array, key_ids_S: Array) -> Array:
            heads = (a.swapaxes(0, 1) for a in (q_THK, k_SGK, v_SGK))
            return attend_part(*heads, kernels.SegmentIds(query_ids_T, key_ids_S)).swapaxes(0, 1)

        with (
            jax.numpy_dtype_promotion("standard"),  # the kernel mixes types and ranks
            jax.numpy_rank_promotion("allow"),
            jax.named_scope(share),  # read by `kernel_flops`
        ):
            return jax.vmap(row)(q, k, v, query_ids, key_ids)

    queries, keys = ("batch", "time", "heads", "head"), ("batch", None, "kv_heads", "head")
    in_axes = (names, queries, keys, keys, ("batch", "time"), ("batch", None))
    split = next((name for name in ("batch", "heads", "time") if num_shards(name) > 1), "batch")
    mapped = logical_shard_map(attend, in_axes, queries, reduce=split, check=False)
    scaled = (q.astype(jnp.float32) / math.sqrt(K)).astype(q.dtype)
    return mapped(pieces, scaled, k, v, query_ids, key_ids)


def _kernel(mask: Any, num_heads: int, interpret: bool) -> kernels.SplashAttentionKernel:
    """The kernel for one mask; its arrays say which blocks of it are visited, for all heads of a device alike."""
    T, S = mask.shape
    block_q, block_kv = (_block(size) for size in (T // num_shards("time"), S))
    sizes = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    heads = masks.MultiHeadMask([mask] * num_heads)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return kernels.make_splash_mha(
            heads,
            block_sizes=sizes,
            head_shards=num_shards("heads"),
            q_seq_shards=num_shards("time"),
            interpret=interpret,
        )


def _block(size: int) -> int:
    """The longest block that divides `size`."""
    return next(block for block in range(min(LONGEST_BLOCK, size), 0, -LANES) if size % block == 0)


def _piece_axes(piece: Array) -> tuple[str | None, ...]:
    """Logical axes of one of the arrays that tell the kernel about its mask.

    Positions of the queries; partial blocks, which all devices keep; and what is next for each block of queries.
    """
    if piece.ndim == 1:
        return ("time",)
    return (None, None, None) if piece.dtype == bool else ("heads", "time", None)


def _share(mask: Any) -> str:
    """Name of a scope that says how many blocks of scores the kernel computes, of how many."""
    T, S = mask.shape
    block_q, block_kv = _block(T // num_shards("time")), _block(S)
    blocks = mask[:, :].reshape(T // block_q, block_q, S // block_kv, block_kv)
    return f"splash_{np.count_nonzero(blocks.any(axis=(1, 3)))}_of_{blocks.shape[0] * blocks.shape[2]}"


# Matrix products of T x S x K in each kernel: q k, p v; with dp = do v the gradients dq = ds k, dk = ds q, dv = p do.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def kernel_flops(label: str, shapes: Sequence[tuple[int, ...]]) -> int:
    """Floating-point operations of one of the kernels of `splash_attend`, skipped blocks left out.

    Args:
      label: its name and the scopes around it.
      shapes: of its floating-point operands; queries [.. H T K] and keys [.. G S K] come first.
    Returns:
      0 for any other kernel.
    """
    kernel, share = re.search(r"splash_mha_(fwd|dq|dkv)", label), re.search(r"splash_(\d+)_of_(\d+)", label)
    if kernel is None or share is None:
        return 0
    q, k = shapes[:2]
    return 2 * _PRODUCTS[kernel[1]] * math.prod(q) * k[-2] * int(share[1]) // int(share[2])
