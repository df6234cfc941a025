"""A text through a Titans memory, chunk by chunk: `chunk_form` over rows, heads and chunks."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lm2_jax.memory.base import Metrics, record
from lm2_jax.memory.chunk_form import (
    Fast,
    Network,
    Rates,
    advance,
    chunk_scan,
    group_of,
    grouped_scan,
    linearise,
    plain,
    plain_scan,
    presence,
    recall,
    surprise,
)
from lm2_jax.memory.inner import InnerLoss, Weights
from lm2_jax.partition import Shards, logical_shard_map, parts
from lm2_jax.types import Array, Bool, Float

Remat = Literal["none", "chunks", "groups"]
BLOCK_TOKENS = 64  # longer: products of a chunk's tokens among each other cost more than moving the weights on
SCANS = {"none": plain_scan, "chunks": chunk_scan, "groups": grouped_scan}


class Rules(NamedTuple):
    """What an update is told by the config."""

    network: Network
    loss: InnerLoss
    chunk_tokens: int
    held: tuple[bool, bool, bool]  # whether step size, momentum and forgetting are one value per chunk


class Tokens(NamedTuple):
    """A text as the memory sees it, or, with [J B H C ..] in the place of [B T H ..], its chunks."""

    q: Array | None  # None where nothing is read
    k: Array
    v: Array
    rates: Rates
    valid: Bool[Array, "..."]


class Measured(NamedTuple):
    """Of each token, at the weights before its chunk."""

    loss: Float[Array, "J B H C"]
    surprise: Float[Array, "J B H C"]
    rates: Rates


def over_heads(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(slow, *fast)` of one head, over rows and heads: leaves of `slow` are [H ..], those of the others [B H ..]."""

    def call(slow: Any, *fast: Any) -> Any:
        heads = jax.vmap(fn, in_axes=(0, *[0] * len(fast)))
        return jax.vmap(heads, in_axes=(None, *[0] * len(fast)))(slow, *fast)

    return call


def hold(rates: Rates, valid_C: Bool[Array, " C"], held: tuple[bool, bool, bool]) -> Rates:
    """The rates of a chunk, where configured those of its first valid token for all of it.

    An average over the chunk would let a token read what later ones say.
    """
    first = jnp.argmax(valid_C)

    def one(log_C: Array | None, is_held: bool) -> Array | None:
        return log_C if log_C is None or not is_held else jnp.broadcast_to(log_C[first], log_C.shape)

    step_C = one(rates.step, held[0])
    assert step_C is not None
    return Rates(step_C, one(rates.log_momentum, held[1]), one(rates.log_keep, held[2]))


def chunk(
    rules: Rules, scale_C: Float[Array, " C"] | None, norm: Any, fast: Fast, tokens: Tokens
) -> tuple[Fast, tuple[Array | None, Array, Array, Rates]]:
    """One chunk of one head.

    All gradients are at the chunk's start; a long chunk reads and moves on in blocks, which gives the same.

    Args:
      rules: network, loss and granularity of the rates.
      scale_C: see `presence`.
      norm: slow weights of the network's norm.
      fast: before the chunk.
      tokens: [C ..].
    Returns:
      Weights and momentum behind the chunk; answers [C K] if there are queries, losses, surprises and rates.
    """
    rates = hold(tokens.rates, tokens.valid, rules.held)
    gradients, loss_C = linearise(rules.network, rules.loss, fast.weights, tokens.k, tokens.v, norm)
    measured = jax.lax.stop_gradient((loss_C, surprise(rules.network, gradients), rates))

    def block(fast: Fast, part: tuple[Any, ...]) -> tuple[Fast, Array | None]:
        gradients, rates, valid_C, q_CK = part
        weights, momentum = presence(rates, valid_C, scale_C)
        y_CK = None if q_CK is None else recall(rules.network, fast, gradients, weights, q_CK, norm)
        return advance(rules.network, fast, gradients, weights, momentum), y_CK

    whole = (gradients, rates, tokens.valid, tokens.q)
    C, blocks = rules.chunk_tokens, rules.chunk_tokens // BLOCK_TOKENS
    if scale_C is not None or blocks < 2 or C % BLOCK_TOKENS:  # a scale is of the whole chunk's gradients
        after, y_CK = block(fast, whole)
    else:
        parts = jax.tree.map(lambda a: a.reshape(blocks, BLOCK_TOKENS, *a.shape[1:]), whole)
        after, y_CK = chunk_scan(block, fast, parts, 1)
        y_CK = None if y_CK is None else y_CK.reshape(C, *y_CK.shape[2:])
    return after, (y_CK, *measured)


def each(fn: Callable[[Weights], Weights], fast: Fast) -> Fast:
    """`fn` of the weights and of the momentum, where there is one."""
    return Fast(fn(fast.weights), None if fast.momentum is None else fn(fast.momentum))


def run(
    rules: Rules, norm: Any, scale_C: Float[Array, " C"] | None, fast: Fast, tokens: Tokens, remat: Remat
) -> tuple[Fast, Float[Array, "B T H K"] | None, Measured]:
    """T tokens of all rows and heads; a rest that fills no chunk is a chunk with padding.

    Args:
      rules: network, loss and granularity of the rates.
      norm: slow weights of the network's norm, [H K], or None.
      scale_C: see `presence`.
      fast: weights and momentum before the tokens, [B H I O].
      tokens: [B T H ..], `valid` [B T].
      remat: what the backward pass keeps, a key of `SCANS`.
    Returns:
      Weights and momentum behind the tokens, answers if there are queries, and what was measured.

    Each device runs its own rows and heads over all tokens; where devices share the hidden width of the network, they
    sum what comes back from it.
    """
    split = next((name for name in ("hidden", "heads", "batch", "time") if parts(name) > 1), "hidden")

    def own(shards: Shards, norm: Any, scale_C: Any, fast: Fast, tokens: Tokens) -> tuple[Fast, Any, Measured]:
        shards = shards if split == "hidden" else Shards()  # rows and heads need nothing of one another
        here = rules._replace(network=rules.network._replace(shards=shards))
        norm, scale_C, floats = shards.receive((norm, scale_C, tokens._replace(valid=None)))
        fast = each(here.network.received, fast)
        after, *made = _run(here, norm, scale_C, fast, floats._replace(valid=tokens.valid), remat)
        return each(here.network.returned, after), *shards.enter(made)

    def axes(*first: str | None) -> Any:
        return lambda a: (*first, *[None] * (a.ndim - len(first)))

    of_tokens = jax.tree.map(axes("batch", None, "heads"), tokens._replace(valid=None))
    of_tokens = of_tokens._replace(valid=("batch", None))
    of_weights = tuple(("batch", "heads", *names) for names in rules.network.inner.axes())
    of_fast: Any = Fast(of_weights, fast.momentum and of_weights)  # pyright: ignore[reportArgumentType]
    scanned = (None, "batch", "heads", None)
    of_norm, of_scale = jax.tree.map(axes("heads"), norm), jax.tree.map(axes(), scale_C)
    of_rates = jax.tree.map(lambda _: scanned, tokens.rates)
    of_answers = None if tokens.q is None else ("batch", None, "heads", None)
    out_axes = (of_fast, of_answers, Measured(scanned, scanned, of_rates))  # pyright: ignore[reportArgumentType]
    in_axes = (of_norm, of_scale, of_fast, of_tokens)
    # Unchecked: a gradient inside, taken by what is the same on all devices, would be summed over them.
    return logical_shard_map(own, in_axes, out_axes, reduce=split, check=False)(norm, scale_C, fast, tokens)


def _run(
    rules: Rules, norm: Any, scale_C: Float[Array, " C"] | None, fast: Fast, tokens: Tokens, remat: Remat
) -> tuple[Fast, Float[Array, "B T H K"] | None, Measured]:
    """`run` on one device's rows and heads."""
    B, T, H, K = tokens.k.shape
    chunks = math.ceil(T / rules.chunk_tokens)
    group = group_of(chunks) if remat == "groups" else 1
    total = math.ceil(chunks / group) * group

    def step(fast: Fast, tokens: Tokens) -> tuple[Fast, Any]:
        return jax.vmap(lambda norm, *args: chunk(rules, scale_C, norm, *args))(norm_N, fast, tokens)

    # Rows and heads are one axis N meanwhile: on a CPU, sums over the last of four axes are far slower than of three.
    norm_N = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (B, *a.shape)).reshape(B * H, *a.shape[1:]), norm)
    fast_N = jax.tree.map(lambda a: a.reshape(B * H, *a.shape[2:]), fast)
    inputs = jax.tree.map(lambda a: to_chunks(a, total, rules.chunk_tokens), _with_heads(tokens))
    inputs_N = jax.tree.map(lambda a: a.reshape(total, B * H, *a.shape[3:]), inputs)
    fast_N, made_N = SCANS[remat](step, fast_N, inputs_N, group)
    fast = jax.tree.map(lambda a: a.reshape(B, H, *a.shape[1:]), fast_N)
    y_JBHCK, *measured = jax.tree.map(lambda a: a.reshape(total, B, H, *a.shape[2:]), made_N)
    y_BTHK = None if y_JBHCK is None else jnp.moveaxis(y_JBHCK, (0, 3), (1, 2)).reshape(B, -1, H, K)[:, :T]
    return fast, y_BTHK, Measured(*measured)


def ask(network: Network, norm: Any, weights: Weights, q_BTHK: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    """f(q; W) of all rows and heads, shared between devices as in `run`.

    Args:
      network: f.
      norm: slow weights of the network's norm, [H K], or None.
      weights: the same for all tokens of a row, [B H I O].
      q_BTHK: queries.
    """

    def own(shards: Shards, norm: Any, weights: Weights, q_BTHK: Array) -> Array:
        here = network._replace(shards=shards)
        norm, q_BTHK = shards.receive((norm, q_BTHK))
        asked = over_heads(lambda norm, weights, q_TK: plain(here, weights, q_TK, norm))
        y_BHTK = asked(norm, here.received(weights), jnp.moveaxis(q_BTHK, 1, 2))
        return shards.enter(jnp.moveaxis(y_BHTK, 1, 2))

    of_weights = tuple(("batch", "heads", *names) for names in network.inner.axes())
    of_norm, of_rows = jax.tree.map(lambda a: ("heads", *[None] * (a.ndim - 1)), norm), ("batch", None, "heads", None)
    in_axes = (of_norm, of_weights, of_rows)
    return logical_shard_map(own, in_axes, of_rows, reduce="hidden", check=False)(norm, weights, q_BTHK)


def _with_heads(tokens: Tokens) -> Tokens:
    B, T, H, _ = tokens.k.shape
    return tokens._replace(valid=jnp.broadcast_to(tokens.valid[:, :, None], (B, T, H)))


def to_chunks(a: Array, chunks: int, size: int) -> Array:
    """[B T H ..] as [J B H C ..]; what is missing at the end is zero."""
    B, T, *rest = a.shape
    a = jnp.pad(a, ((0, 0), (0, chunks * size - T), *[(0, 0)] * len(rest)))
    return jnp.moveaxis(a.reshape(B, chunks, size, *rest), (1, 3), (0, 2))


def note_update(metrics: Metrics, rules: Rules, norm: Any, after: Fast, tokens: Tokens, measured: Measured) -> None:
    """Diagnostics of a segment: means over valid tokens; the loss before and after that of the last chunk's update.

    Args:
      metrics: receives surprise (norm of a token's gradient), step, momentum, forgetting, both losses, state_norm.
      rules: network and loss.
      norm: slow weights of the network's norm.
      after: weights behind the segment.
      tokens: [B T H ..].
      measured: in chunks.
    """
    size = rules.chunk_tokens
    valid_JBHC = to_chunks(_with_heads(tokens).valid, measured.loss.shape[0], size)

    def mean(a: Array, counts: Array) -> Array:
        return jnp.sum(jnp.where(counts, a, jnp.zeros_like(a))) / jnp.maximum(counts.sum(), 1).astype(a.dtype)

    rates = measured.rates
    record(metrics, surprise=mean(measured.surprise, valid_JBHC), step_size=mean(rates.step, valid_JBHC))
    if rates.log_momentum is not None:
        record(metrics, momentum=mean(jnp.exp(rates.log_momentum), valid_JBHC))
    if rates.log_keep is not None:
        record(metrics, forgetting=mean(-jnp.expm1(rates.log_keep), valid_JBHC))
    last = (tokens.k.shape[1] - 1) // size
    k_BHCK, v_BHCK = (to_chunks(a[:, last * size :], 1, size)[0] for a in (tokens.k, tokens.v))

    def loss(norm: Any, weights: Any, k_CK: Array, v_CK: Array) -> Array:
        return rules.loss(plain(rules.network, weights, k_CK, norm), v_CK)

    again_BHC = over_heads(loss)(*jax.lax.stop_gradient((norm, after.weights, k_BHCK, v_BHCK)))
    record(metrics, inner_loss_before=mean(measured.loss[last], valid_JBHC[last]))
    record(metrics, inner_loss_after=mean(again_BHC, valid_JBHC[last]))
    squares = [jnp.sum(w * w, axis=(2, 3)) for w in jax.lax.stop_gradient(after.weights)]
    record(metrics, state_norm=jnp.sqrt(sum(squares[1:], squares[0])))
