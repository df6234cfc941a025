"""`chunk` over all rows, heads and chunks, on one device or many.

Each device computes its own rows and heads for all tokens. Devices may also share the hidden width of the inner
network. Each of them then holds a part of the weights, of X where a layer reads the hidden width and of G where a layer
writes it. This is tensor parallelism as in Megatron: a replicated array enters sharded work through `Shards.enter`
(identity forward, sum of the gradients backward), and partial results are summed by `Shards.leave`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lm2_jax.ops.ttt_chunk.chunk import (
    ChunkInputs,
    ChunkSpec,
    FastWeights,
    Network,
    TokenMetrics,
    apply_network,
    chunk_step,
    over_rows_and_heads,
)
from lm2_jax.ops.ttt_chunk.networks import FROM_HIDDEN, REPLICATED, TO_HIDDEN, InnerNetwork, Weights
from lm2_jax.ops.ttt_chunk.remat import SCANS, group_size
from lm2_jax.partition import Shards, logical_shard_map, num_shards
from lm2_jax.types import Array, Float

Remat = Literal["none", "chunks", "groups"]


@dataclasses.dataclass(frozen=True)
class ShardedNetwork(Network):
    """An inner network whose hidden width devices may share."""

    shards: Shards

    def layer_input(self, i: int, z: Float[Array, "R I"]) -> Float[Array, "R _"]:
        return super().layer_input(i, self.shards.copy_to(z) if self._is(TO_HIDDEN, i) else z)

    def layer_output(self, i: int, y: Float[Array, "R O"]) -> Float[Array, "R O"]:
        """The output of layer i; partial outputs are summed over devices."""
        return self.shards.reduce_from(y) if self._is(FROM_HIDDEN, i) else y

    def output_gradient(self, i: int, g: Float[Array, "R O"]) -> Float[Array, "R O"]:
        return self.shards.copy_to(g) if self._is(FROM_HIDDEN, i) else g

    def per_layer(self, coefficients: Any) -> list[Any]:
        entered = self.shards.copy_to(coefficients)
        return [coefficients if axes == REPLICATED else entered for axes in self.inner.axes()]

    def sum_layers(self, by_layer: list[Array]) -> Array:
        """The sum over layers and devices."""
        replicated = [a for i, a in enumerate(by_layer) if self._is(REPLICATED, i)]
        split = [a for i, a in enumerate(by_layer) if not self._is(REPLICATED, i)]
        return super().sum_layers(([self.shards.reduce_from(super().sum_layers(split))] if split else []) + replicated)

    def at_replicated(self, fn: Callable[[Array], Array], fast: FastWeights) -> FastWeights:
        """`fn` of weights and momentum of replicated layers; the other layers unchanged."""

        def each(weights: Weights) -> Weights:
            return tuple(fn(w) if self._is(REPLICATED, i) else w for i, w in enumerate(weights))

        return FastWeights(each(fast.weights), None if fast.momentum is None else each(fast.momentum))

    def _is(self, axes: tuple[str, str], i: int) -> bool:
        return self.inner.axes()[i] == axes


def ttt_chunk(
    spec: ChunkSpec, norm: Any, scale_C: Float[Array, " C"] | None, fast: FastWeights, inputs: ChunkInputs, remat: Remat
) -> tuple[FastWeights, Float[Array, "B T H K"] | None, TokenMetrics]:
    """Trains on T tokens of all rows and heads; an incomplete last chunk is padded.

    Args:
      spec: network, loss and granularity of the rates.
      norm: parameters of the network's norm, [H K], or None.
      scale_C: see `decay_coefficients`.
      fast: weights and momentum before the tokens, [B H I O].
      inputs: tokens, [B T H ..]; `valid` is [B T].
      remat: what the backward pass keeps, a key of `SCANS`.
    Returns:
      Weights and momentum after the tokens, y if there are queries, and metrics [J B H C].
    """
    split = next((name for name in ("hidden", "heads", "batch", "time") if num_shards(name) > 1), "hidden")

    def local(shards: Shards, norm: Any, scale_C: Any, fast: FastWeights, inputs: ChunkInputs) -> Any:
        shards = shards if split == "hidden" else Shards()  # rows and heads are independent
        network = ShardedNetwork(spec.network.inner, shards)
        norm, scale_C, floats = shards.scale_replicated_grad((norm, scale_C, inputs._replace(valid=None)))
        fast, inputs = network.at_replicated(shards.scale_replicated_grad, fast), floats._replace(valid=inputs.valid)
        after, *results = _scan(spec._replace(network=network), norm, scale_C, fast, inputs, remat)
        return network.at_replicated(shards.copy_to, after), *shards.copy_to(results)

    def axes(*first: str | None) -> Any:
        return lambda a: (*first, *[None] * (a.ndim - len(first)))

    inputs_axes = jax.tree.map(axes("batch", None, "heads"), inputs._replace(valid=None))
    inputs_axes = inputs_axes._replace(valid=("batch", None))
    weights_axes = _weights_axes(spec.network.inner)
    fast_axes: Any = FastWeights(weights_axes, fast.momentum and weights_axes)
    of_chunks = (None, "batch", "heads", None)
    y_axes = None if inputs.q is None else ("batch", None, "heads", None)
    metrics_axes: Any = TokenMetrics(of_chunks, of_chunks, jax.tree.map(lambda _: of_chunks, inputs.rates))  # pyright: ignore[reportArgumentType]
    norm_axes, scale_axes = jax.tree.map(axes("heads"), norm), jax.tree.map(axes(), scale_C)
    in_axes, out_axes = (norm_axes, scale_axes, fast_axes, inputs_axes), (fast_axes, y_axes, metrics_axes)
    # Unchecked: with the check, jax would sum the inner gradient by a replicated array over devices.
    return logical_shard_map(local, in_axes, out_axes, reduce=split, check=False)(norm, scale_C, fast, inputs)


def read_frozen(network: Network, norm: Any, weights: Weights, q_BTHK: Float[Array, "B T H K"]) -> Array:
    """f(q; W) of all rows and heads, [B T H K], with the same weights for all tokens of a row.

    Args:
      network: f.
      norm: parameters of the network's norm, [H K], or None.
      weights: [B H I O].
      q_BTHK: queries.
    """

    def local(shards: Shards, norm: Any, weights: Weights, q_BTHK: Array) -> Array:
        here = ShardedNetwork(network.inner, shards)
        norm, q_BTHK = shards.scale_replicated_grad((norm, q_BTHK))
        weights = here.at_replicated(shards.scale_replicated_grad, FastWeights(weights, None)).weights
        read = over_rows_and_heads(lambda norm, weights, q_TK: apply_network(here, weights, q_TK, norm))
        return shards.copy_to(jnp.moveaxis(read(norm, weights, jnp.moveaxis(q_BTHK, 1, 2)), 1, 2))

    norm_axes = jax.tree.map(lambda a: ("heads", *[None] * (a.ndim - 1)), norm)
    q_axes = ("batch", None, "heads", None)
    in_axes = (norm_axes, _weights_axes(network.inner), q_axes)
    return logical_shard_map(local, in_axes, q_axes, reduce="hidden", check=False)(norm, weights, q_BTHK)


def _weights_axes(inner: InnerNetwork) -> tuple[Any, ...]:
    """Logical axes of [B H I O], layer by layer."""
    return tuple(("batch", "heads", *names) for names in inner.axes())


def _scan(
    spec: ChunkSpec, norm: Any, scale_C: Float[Array, " C"] | None, fast: FastWeights, inputs: ChunkInputs, remat: Remat
) -> tuple[FastWeights, Float[Array, "B T H K"] | None, TokenMetrics]:
    """`ttt_chunk` for the rows and heads of one device."""
    B, T, H, K = inputs.k.shape
    chunks = math.ceil(T / spec.chunk_tokens)
    group = group_size(chunks) if remat == "groups" else 1
    total = math.ceil(chunks / group) * group

    def step(fast: FastWeights, inputs: ChunkInputs) -> tuple[FastWeights, Any]:
        return jax.vmap(lambda norm, *args: chunk_step(spec, scale_C, norm, *args))(norm_N, fast, inputs)

    # Rows and heads are one axis N here: on CPUs, sums over the last of four axes are far slower than of three.
    norm_N = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (B, *a.shape)).reshape(B * H, *a.shape[1:]), norm)
    fast_N = jax.tree.map(lambda a: a.reshape(B * H, *a.shape[2:]), fast)
    chunked = jax.tree.map(lambda a: split_chunks(a, total, spec.chunk_tokens), _with_heads(inputs))
    chunked_N = jax.tree.map(lambda a: a.reshape(total, B * H, *a.shape[3:]), chunked)
    fast_N, results_N = SCANS[remat](step, fast_N, chunked_N, group)
    fast = jax.tree.map(lambda a: a.reshape(B, H, *a.shape[1:]), fast_N)
    y_JBHCK, metrics = jax.tree.map(lambda a: a.reshape(total, B, H, *a.shape[2:]), results_N)
    y_BTHK = None if y_JBHCK is None else jnp.moveaxis(y_JBHCK, (0, 3), (1, 2)).reshape(B, -1, H, K)[:, :T]
    return fast, y_BTHK, metrics


def _with_heads(inputs: ChunkInputs) -> ChunkInputs:
    """`valid` as [B T H]."""
    return inputs._replace(valid=jnp.broadcast_to(inputs.valid[:, :, None], inputs.k.shape[:3]))


def split_chunks(a: Array, chunks: int, chunk_tokens: int) -> Array:
    """[B T H ..] as [J B H C ..], padded with zeros at the end."""
    B, T, *rest = a.shape
    a = jnp.pad(a, ((0, 0), (0, chunks * chunk_tokens - T), *[(0, 0)] * len(rest)))
    return jnp.moveaxis(a.reshape(B, chunks, chunk_tokens, *rest), (1, 3), (0, 2))


def segment_metrics(
    spec: ChunkSpec, norm: Any, after: FastWeights, inputs: ChunkInputs, measured: TokenMetrics
) -> dict[str, Array]:
    """Diagnostics of a segment.

    Args:
      spec: network and loss.
      norm: parameters of the network's norm.
      after: weights after the segment.
      inputs: tokens, [B T H ..].
      measured: the metrics of `ttt_chunk`.
    Returns:
      Means over valid tokens: surprise (norm of the gradient), step_size, momentum and forgetting if there are such
      gates; inner_loss_before and inner_loss_after, before and after the update of the last chunk, over that chunk;
      state_norm [B H].
    """
    size = spec.chunk_tokens
    valid_JBHC = split_chunks(_with_heads(inputs).valid, measured.loss.shape[0], size)

    def mean(a: Array, valid: Array) -> Array:
        return jnp.sum(jnp.where(valid, a, jnp.zeros_like(a))) / jnp.maximum(valid.sum(), 1).astype(a.dtype)

    def loss(norm: Any, weights: Any, k_CK: Array, v_CK: Array) -> Array:
        return spec.loss(apply_network(spec.network, weights, k_CK, norm), v_CK)

    rates = measured.rates
    metrics = {"surprise": mean(measured.gradient_norm, valid_JBHC), "step_size": mean(rates.step, valid_JBHC)}
    if rates.log_momentum is not None:
        metrics["momentum"] = mean(jnp.exp(rates.log_momentum), valid_JBHC)
    if rates.log_keep is not None:
        metrics["forgetting"] = mean(-jnp.expm1(rates.log_keep), valid_JBHC)
    last = (inputs.k.shape[1] - 1) // size
    k_BHCK, v_BHCK = (split_chunks(a[:, last * size :], 1, size)[0] for a in (inputs.k, inputs.v))
    after_BHC = over_rows_and_heads(loss)(*jax.lax.stop_gradient((norm, after.weights, k_BHCK, v_BHCK)))
    metrics["inner_loss_before"] = mean(measured.loss[last], valid_JBHC[last])
    metrics["inner_loss_after"] = mean(after_BHC, valid_JBHC[last])
    squares = [jnp.sum(w * w, axis=(2, 3)) for w in jax.lax.stop_gradient(after.weights)]
    return metrics | {"state_norm": jnp.sqrt(sum(squares[1:], squares[0]))}
