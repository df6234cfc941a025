"""A chunk of test-time training of one head, as matrix products.

With all gradients u_i of a chunk taken at its start weights W_0 (arXiv:2501.00663, equations 13-18):

    S_t = e_t S_{t-1} - theta_t u_t,   W_t = a_t W_{t-1} + S_t,   a_t = 1 - alpha_t

Both recurrences are linear. Let L_a[t, s] = prod_{s<j<=t} a_j for s <= t, else 0, and L_e likewise. Then

    W_t = A_t W_0 + b_t S_0 - sum_i P[t, i] u_i,   P = L_a L_e diag(theta),   A_t = prod_{j<=t} a_j,
    S_t = H_t S_0 - sum_i L_e[t, i] theta_i u_i,   b = L_a H,                 H_t = prod_{j<=t} e_j.

For a layer z = x W, the gradient of token i is the outer product x_i^T g_i of the layer's input and the derivative of
the loss by the layer's output. A read with the weights after token t is therefore

    z_t W_t = A_t z_t W_0 + b_t z_t S_0 - ((P . (z X^T)) G)_t     (. is the elementwise product)

and W_t is never formed. One backward pass at W_0 gives all g_i.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm2_jax.ops.ttt_chunk import matmul
from lm2_jax.ops.ttt_chunk.matmul import matmul_nn, matmul_nt, matmul_tn
from lm2_jax.ops.ttt_chunk.networks import InnerLoss, InnerNetwork, NormWeights, Weights
from lm2_jax.ops.ttt_chunk.remat import remat_scan
from lm2_jax.types import Array, Bool, Float

BLOCK_TOKENS = 64  # in longer blocks, token-by-token products cost more than updating the weights


class Rates(NamedTuple):
    """Step size and gates of each token; None where there is no momentum or no forgetting."""

    step: Float[Array, "*lead C"]  # theta
    log_momentum: Float[Array, "*lead C"] | None  # log e
    log_keep: Float[Array, "*lead C"] | None  # log a


class DecayCoefficients(NamedTuple):
    """Coefficients of W_0, S_0 and each gradient in the weights, or the momentum, after each of R tokens."""

    start: Float[Array, " R"]  # A
    momentum: Float[Array, " R"] | None  # b, or H for the momentum
    gradient: Float[Array, "R C"]  # P, or L_e diag(theta) for the momentum; subtracted


class TokenGradients(NamedTuple):
    """Each token's gradient for each layer: the outer product of a row of `inputs` and the same row of `outputs`."""

    inputs: tuple[Float[Array, "*lead C _"], ...]  # X
    outputs: tuple[Float[Array, "*lead C _"], ...]  # G


class FastWeights(NamedTuple):
    """Weights that are trained at test time, and their momentum."""

    weights: Weights
    momentum: Weights | None


@dataclasses.dataclass(frozen=True)
class Network:
    """An inner network on one device; `sharded.ShardedNetwork` adds the exchange between devices."""

    inner: InnerNetwork

    def layer_input(self, i: int, z: Float[Array, "R I"]) -> Float[Array, "R _"]:
        """The input of layer i, with a last column of ones if layers have biases."""
        return jnp.concatenate([z, jnp.ones((z.shape[0], 1), z.dtype)], axis=1) if self.inner.has_bias else z

    def layer_output(self, i: int, y: Float[Array, "R O"]) -> Float[Array, "R O"]:
        """The output of layer i."""
        return y

    def output_gradient(self, i: int, g: Float[Array, "R O"]) -> Float[Array, "R O"]:
        """The derivative of the loss by the output of layer i."""
        return g

    def per_layer(self, coefficients: Any) -> list[Any]:
        """A tree, once for each layer."""
        return [coefficients for _ in self.inner.axes()]

    def sum_layers(self, by_layer: list[Array]) -> Array:
        """The sum over layers."""
        return sum(by_layer[1:], by_layer[0])


class ChunkSpec(NamedTuple):
    """What an update takes from the config."""

    network: Network
    loss: InnerLoss
    chunk_tokens: int
    rate_per_chunk: tuple[bool, bool, bool]  # for step, momentum and forgetting: one value for all tokens of a chunk


class ChunkInputs(NamedTuple):
    """Tokens of one head and chunk; with more leading axes, of a text [B T H ..] or of its chunks [J B H C ..]."""

    q: Array | None  # None if nothing is read
    k: Array
    v: Array
    rates: Rates
    valid: Bool[Array, "..."]


class TokenMetrics(NamedTuple):
    """Measurements of each token at the start weights of its chunk."""

    loss: Float[Array, "*lead C"]
    gradient_norm: Float[Array, "*lead C"]  # the paper's surprise
    rates: Rates


def decay_products(log_C: Float[Array, " C"]) -> Float[Array, "C C"]:
    """L[t, s] = exp(sum_{s<j<=t} log_j) for s <= t, else 0.

    Each sum has only its own terms: differences of one running sum would lose all digits after a factor near 0. The
    sums are a product with a matrix of ones, which is faster than `cumsum`.
    """
    position = jnp.arange(log_C.shape[0])
    later = position[:, None] > position[None, :]
    terms = jnp.where(later, log_C[:, None], jnp.zeros_like(log_C)[:, None])
    causal = position[:, None] >= position[None, :]
    sums = matmul.contract(causal.astype(terms.dtype), terms, 1, 0)
    return jnp.where(causal, jnp.exp(sums), jnp.zeros_like(sums))


def decay_coefficients(
    rates: Rates, valid_C: Bool[Array, " C"], scale_C: Float[Array, " C"] | None = None
) -> tuple[DecayCoefficients, DecayCoefficients]:
    """Coefficients of the weights W_t and of the momentum S_t after each token.

    Args:
      rates: step sizes and gates.
      valid_C: tokens that update W and S. The mask is needed because no value of the gates keeps W_t = W_{t-1} when
        there is momentum.
      scale_C: row t of P is multiplied by entry t, for TTT's steps by position.
    Returns:
      (A, b, P), and (0, H, L_e diag(theta)); b and H are None without momentum.
    """
    step_C = jnp.where(valid_C, rates.step, jnp.zeros_like(rates.step))
    C, dtype = step_C.shape[0], step_C.dtype

    def products(log_C: Array | None, default: Array) -> tuple[Array, Array]:
        if log_C is None:
            return default, jnp.ones(C, dtype)
        log_C = jnp.where(valid_C, log_C, jnp.zeros_like(log_C))
        return decay_products(log_C), jnp.exp(jnp.cumsum(log_C))

    keep_CC, start_C = products(rates.log_keep, jnp.tril(jnp.ones((C, C), dtype)))
    keep_CC = keep_CC * valid_C[None, :].astype(dtype)  # only valid tokens add momentum to the weights
    carry_CC, momentum_C = products(rates.log_momentum, jnp.eye(C, dtype=dtype))
    gradient_CC = matmul_nn(keep_CC, carry_CC) * step_C[None, :]
    momentum_CC = carry_CC * step_C[None, :]
    if scale_C is not None:
        gradient_CC, momentum_CC = gradient_CC * scale_C[:, None], momentum_CC * scale_C[:, None]
    has_momentum = rates.log_momentum is not None
    added_C = matmul_nn(keep_CC, momentum_C[:, None])[:, 0] if has_momentum else None
    return (
        DecayCoefficients(start_C, added_C, gradient_CC),
        DecayCoefficients(jnp.zeros_like(start_C), momentum_C if has_momentum else None, momentum_CC),
    )


def coefficients_at(coefficients: DecayCoefficients, index: Any) -> DecayCoefficients:
    """The rows of some tokens of a chunk."""
    return jax.tree.map(lambda a: a[index], coefficients)


def chunk_rates(rates: Rates, valid_C: Bool[Array, " C"], rate_per_chunk: tuple[bool, bool, bool]) -> Rates:
    """Replaces the rates that are set once per chunk by those of the chunk's first valid token.

    A mean over the chunk would not be causal.
    """
    first = jnp.argmax(valid_C)
    pairs = zip(rates, rate_per_chunk, strict=True)
    return Rates._make(jnp.broadcast_to(r[first], r.shape) if once and r is not None else r for r, once in pairs)


def apply_network(network: Network, weights: Weights, x: Float[Array, "R K"], norm: NormWeights | None) -> Array:
    """f(x; W) with the same weights for all rows, [R K]."""

    def linear(i: int, z: Array) -> Array:
        return network.layer_output(i, matmul_nn(network.layer_input(i, z), weights[i]))

    return network.inner(linear, x, norm)


def per_token_gradients(
    network: Network,
    loss: InnerLoss,
    weights: Weights,
    k_CK: Float[Array, "C K"],
    v_CK: Float[Array, "C K"],
    norm: NormWeights | None,
) -> tuple[TokenGradients, Float[Array, " C"]]:
    """Each token's gradient at the given weights, as factors of outer products, and its loss.

    The derivative by a layer's output is the derivative by an array of zeros that is added to it. One backward pass
    gives the derivatives of all tokens and layers.

    Raises:
      ValueError: the network calls a layer twice.
    """

    def total(zeros: tuple[Array, ...]) -> tuple[Array, tuple[tuple[Array, ...], Array]]:
        inputs: dict[int, Array] = {}

        def linear(i: int, z: Array) -> Array:
            if i in inputs:
                raise ValueError(f"{type(network.inner).__name__} calls layer {i} twice")
            inputs[i] = network.layer_input(i, z)
            return network.layer_output(i, matmul_nn(inputs[i], weights[i])) + zeros[i]

        loss_C = loss(network.inner(linear, k_CK, norm), v_CK)
        return loss_C.sum(), (tuple(inputs[i] for i in range(len(weights))), loss_C)

    zeros = tuple(jnp.zeros((k_CK.shape[0], w.shape[1]), k_CK.dtype) for w in weights)
    outputs, (inputs, loss_C) = jax.grad(total, has_aux=True)(zeros)
    return TokenGradients(inputs, tuple(network.output_gradient(i, g) for i, g in enumerate(outputs))), loss_C


def scaled_product(z_RI: Float[Array, "R I"], a_R: Float[Array, " R"], w_IO: Float[Array, "I O"]) -> Array:
    """diag(a) z W, [R O]; scales the smaller of z and the result."""
    if w_IO.shape[0] < w_IO.shape[1]:
        return matmul_nn(a_R[:, None] * z_RI, w_IO)
    return a_R[:, None] * matmul_nn(z_RI, w_IO)


def weighted_outer(x_CI: Float[Array, "C I"], a_C: Float[Array, " C"], g_CO: Float[Array, "C O"]) -> Array:
    """x^T diag(a) g, [I O]; scales the smaller of x and g."""
    if x_CI.shape[1] < g_CO.shape[1]:
        return matmul_tn(a_C[:, None] * x_CI, g_CO)
    return matmul_tn(x_CI, a_C[:, None] * g_CO)


def read_per_token(
    network: Network,
    fast: FastWeights,
    gradients: TokenGradients,
    coefficients: DecayCoefficients,
    q_RK: Float[Array, "R K"],
    norm: NormWeights | None,
) -> Float[Array, "R K"]:
    """f(q_t; W_t): each query reads the weights after its own token.

    Args:
      network: f.
      fast: W_0 and S_0.
      gradients: of the chunk's C tokens at W_0.
      coefficients: A, b and P of the weights, at the R tokens that read.
      q_RK: queries.
      norm: parameters of the network's norm.
    """
    by_layer = network.per_layer(coefficients)

    def linear(i: int, z: Array) -> Array:
        z, at = network.layer_input(i, z), by_layer[i]
        y = scaled_product(z, at.start, fast.weights[i])
        if fast.momentum is not None:
            y = y + scaled_product(z, at.momentum, fast.momentum[i])
        y = y - matmul_nn(at.gradient * matmul_nt(z, gradients.inputs[i]), gradients.outputs[i])
        return network.layer_output(i, y)

    return network.inner(linear, q_RK, norm)


def update(
    network: Network,
    fast: FastWeights,
    gradients: TokenGradients,
    of_weights: DecayCoefficients,
    of_momentum: DecayCoefficients,
) -> FastWeights:
    """W_C and S_C, after the last token.

    Args:
      network: f.
      fast: W_0 and S_0.
      gradients: of the chunk's C tokens at W_0.
      of_weights: A, b and P, all rows.
      of_momentum: the same for the momentum.
    """
    last = network.per_layer((coefficients_at(of_weights, -1), coefficients_at(of_momentum, -1)))
    weights, momentum = [], []
    for i, (x_CI, g_CO) in enumerate(zip(gradients.inputs, gradients.outputs, strict=True)):
        in_weights, in_momentum = last[i]
        w_IO = in_weights.start * fast.weights[i] - weighted_outer(x_CI, in_weights.gradient, g_CO)
        if fast.momentum is not None:
            w_IO = w_IO + in_weights.momentum * fast.momentum[i]
            kept_IO = in_momentum.momentum * fast.momentum[i]
            momentum.append(kept_IO - weighted_outer(x_CI, in_momentum.gradient, g_CO))
        weights.append(w_IO)
    return FastWeights(tuple(weights), None if fast.momentum is None else tuple(momentum))


def gradient_norms(network: Network, gradients: TokenGradients) -> Float[Array, "*lead C"]:
    """Norm of each token's gradient by all weights; the norm of an outer product is the product of the norms."""
    pairs = zip(gradients.inputs, gradients.outputs, strict=True)
    return jnp.sqrt(network.sum_layers([jnp.sum(x * x, axis=-1) * jnp.sum(g * g, axis=-1) for x, g in pairs]))


def chunk_step(
    spec: ChunkSpec, scale_C: Float[Array, " C"] | None, norm: Any, fast: FastWeights, inputs: ChunkInputs
) -> tuple[FastWeights, tuple[Array | None, TokenMetrics]]:
    """One chunk of one head.

    Reads and updates of a long chunk are computed in blocks of `BLOCK_TOKENS`, with all gradients at the chunk's start.
    The result is the same.

    Args:
      spec: network, loss and granularity of the rates.
      scale_C: see `decay_coefficients`.
      norm: parameters of the network's norm.
      fast: weights and momentum before the chunk.
      inputs: tokens, [C ..].
    Returns:
      Weights and momentum after the chunk; y [C K] if there are queries, and metrics.
    """
    rates = chunk_rates(inputs.rates, inputs.valid, spec.rate_per_chunk)
    gradients, loss_C = per_token_gradients(spec.network, spec.loss, fast.weights, inputs.k, inputs.v, norm)
    metrics = jax.lax.stop_gradient(TokenMetrics(loss_C, gradient_norms(spec.network, gradients), rates))

    def block(fast: FastWeights, tokens: tuple[Any, ...]) -> tuple[FastWeights, Array | None]:
        gradients, rates, valid_C, q_CK = tokens
        weights, momentum = decay_coefficients(rates, valid_C, scale_C)
        y_CK = None if q_CK is None else read_per_token(spec.network, fast, gradients, weights, q_CK, norm)
        return update(spec.network, fast, gradients, weights, momentum), y_CK

    tokens, C = (gradients, rates, inputs.valid, inputs.q), spec.chunk_tokens
    blocks = C // BLOCK_TOKENS
    if scale_C is not None or blocks < 2 or C % BLOCK_TOKENS:  # the scale applies to P of the full chunk
        after, y_CK = block(fast, tokens)
    else:
        split = jax.tree.map(lambda a: a.reshape(blocks, BLOCK_TOKENS, *a.shape[1:]), tokens)
        after, y_CK = remat_scan(block, fast, split, 1)
        y_CK = None if y_CK is None else y_CK.reshape(C, *y_CK.shape[2:])
    return after, (y_CK, metrics)


def over_rows_and_heads(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Maps `fn(shared, *own)` of one head: leaves of `shared` are [H ..], leaves of the other arguments [B H ..]."""

    def call(shared: Any, *own: Any) -> Any:
        heads = jax.vmap(fn, in_axes=(0, *[0] * len(own)))
        return jax.vmap(heads, in_axes=(None, *[0] * len(own)))(shared, *own)

    return call
