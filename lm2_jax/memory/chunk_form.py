"""A chunk of test-time training as matrix products: the exact form of Titans' update, one head at a time.

Token by token, with all gradients u_i of a chunk taken at its start weights (arXiv:2501.00663, equations 13-18):

    S_t = e_t S_{t-1} - theta_t u_t,   W_t = a_t W_{t-1} + S_t,   a_t = 1 - alpha_t

Both recurrences are linear, so with L_a[t, s] = prod_{s<j<=t} a_j for s <= t, else 0, and L_e alike,

    W_t = A_t W_0 + b_t S_0 - sum_i P[t, i] u_i,   P = L_a L_e diag(theta),   A_t = prod_{j<=t} a_j,
    S_t = H_t S_0 - sum_i L_e[t, i] theta_i u_i,   b = L_a H,                 H_t = prod_{j<=t} e_j.

The gradient of one layer z = x W by a token is the outer product x_i^T g_i of the layer's input and of the loss's
derivative by its output, so that a read with the weights of its own token, z_t W_t, is

    A_t z_t W_0 + b_t z_t S_0 - ((P . (z X^T)) G)_t

and no token ever has weights of its own. All g come from one backward pass at the start weights.

Devices may share the hidden width of the network (`Shards` of `hidden`). Each then has its part of the weights, of X
behind a layer from it and of G before a layer to it; whatever else is used to make such a part `enter`s first, so that
its gradient is summed over devices, and what a layer from the hidden width gives is summed (`leave`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm2_jax.memory.inner import FROM_HIDDEN, TO_HIDDEN, WHOLE, InnerLoss, InnerNetwork, NormWeights, Weights
from lm2_jax.memory.matmul import t_times, times, times_t
from lm2_jax.partition import Shards
from lm2_jax.types import Array, Bool, Float

Step = Callable[[Any, Any], tuple[Any, Any]]  # (carry, inputs) -> (carry, outputs), of a scan
EXACT = jax.lax.Precision.HIGHEST  # gates are products of many factors: accelerators must not round them to bfloat16


class Rates(NamedTuple):
    """How a chunk's tokens change the memory; None: no momentum, or no forgetting."""

    step: Float[Array, "*lead C"]  # theta
    log_momentum: Float[Array, "*lead C"] | None  # log e
    log_keep: Float[Array, "*lead C"] | None  # log a


class Presence(NamedTuple):
    """How much of what is in the weights, and momentum, behind each of R tokens of a chunk."""

    start: Float[Array, " R"]  # A: the start weights
    momentum: Float[Array, " R"] | None  # b: the start momentum
    gradient: Float[Array, "R C"]  # P: each token's gradient


class Gradients(NamedTuple):
    """What a chunk's tokens would change, layer by layer: outer products of the rows of both."""

    inputs: tuple[Float[Array, "*lead C _"], ...]  # X
    outputs: tuple[Float[Array, "*lead C _"], ...]  # G, derivatives of the loss


class Fast(NamedTuple):
    """Weights that are trained at test time, and their momentum."""

    weights: Weights
    momentum: Weights | None


def products(log_C: Float[Array, " C"]) -> Float[Array, "C C"]:
    """L[t, s] = exp(sum_{s<j<=t} log_j) for s <= t, else 0.

    Sums run over the factors of each entry alone: as differences of one running sum, entries behind a factor near 0
    would lose their digits. They are a product with a matrix of ones, which is quicker than a running sum.
    """
    place = jnp.arange(log_C.shape[0])
    later = place[:, None] > place[None, :]
    own = jnp.where(later, log_C[:, None], jnp.zeros_like(log_C)[:, None])
    upto = place[:, None] >= place[None, :]
    sums = jnp.matmul(upto.astype(own.dtype), own, precision=EXACT)
    return jnp.where(upto, jnp.exp(sums), jnp.zeros_like(sums))


def presence(
    rates: Rates, valid_C: Bool[Array, " C"], scale_C: Float[Array, " C"] | None = None
) -> tuple[Presence, Presence]:
    """How start and gradients are present in the weights W_t and in the momentum S_t behind each token.

    Args:
      rates: step sizes and logarithms of the gates.
      valid_C: where false, the token leaves weights and momentum as they are; no value of the gates could say so, as
        W_t = a W_{t-1} + S_t moves whenever there is momentum.
      scale_C: factor on all gradients as the token at that place sees them (TTT's step matrix has rows of its own).
    Returns:
      (A, b, P), and the same of the momentum: (H as `momentum`, L_e theta as `gradient`, `start` zero).
    """
    step_C = jnp.where(valid_C, rates.step, jnp.zeros_like(rates.step))
    C, dtype = step_C.shape[0], step_C.dtype
    valid_1C = valid_C[None, :].astype(dtype)

    def factors(log_C: Array | None, without: Array) -> tuple[Array, Array]:
        if log_C is None:
            return without, jnp.ones(C, dtype)
        log_C = jnp.where(valid_C, log_C, jnp.zeros_like(log_C))
        return products(log_C), jnp.exp(jnp.cumsum(log_C))

    keep_CC, start_C = factors(rates.log_keep, jnp.tril(jnp.ones((C, C), dtype)))
    keep_CC = keep_CC * valid_1C  # momentum is added by valid tokens alone
    carry_CC, momentum_C = factors(rates.log_momentum, jnp.eye(C, dtype=dtype))
    gradient_CC = jnp.matmul(keep_CC, carry_CC, precision=EXACT) * step_C[None, :]
    momentum_CC = carry_CC * step_C[None, :]
    if scale_C is not None:
        gradient_CC, momentum_CC = gradient_CC * scale_C[:, None], momentum_CC * scale_C[:, None]
    has_momentum = rates.log_momentum is not None
    added_C = jnp.matmul(keep_CC, momentum_C, precision=EXACT) if has_momentum else None
    return (
        Presence(start_C, added_C, gradient_CC),
        Presence(jnp.zeros_like(start_C), momentum_C if has_momentum else None, momentum_CC),
    )


def rows_of(there: Presence, place: Any) -> Presence:
    """The rows of some tokens of a chunk."""
    return jax.tree.map(lambda a: a[place], there)


class Network(NamedTuple):
    """An inner network and the devices that share its hidden width."""

    inner: InnerNetwork
    shards: Shards = Shards()

    def rows(self, i: int, z: Float[Array, "R I"]) -> Float[Array, "R _"]:
        """Inputs of layer i, with a last column of ones where the layer's last row is its bias."""
        z = self.shards.enter(z) if self.inner.axes()[i] == TO_HIDDEN else z
        return jnp.concatenate([z, jnp.ones((z.shape[0], 1), z.dtype)], axis=1) if self.inner.has_bias else z

    def result(self, i: int, y: Float[Array, "R O"]) -> Float[Array, "R O"]:
        """Outputs of layer i, of which each device has made what its part adds."""
        return self.shards.leave(y) if self.inner.axes()[i] == FROM_HIDDEN else y

    def received(self, weights: Weights) -> Weights:
        """Weights as a program by hand gets them; see `Shards.receive`."""
        return self._whole(self.shards.receive, weights)

    def returned(self, weights: Weights) -> Weights:
        """Weights as a program by hand returns them."""
        return self._whole(self.shards.enter, weights)

    def _whole(self, fn: Callable[[Array], Array], weights: Weights) -> Weights:
        return tuple(fn(w) if axes == WHOLE else w for w, axes in zip(weights, self.inner.axes(), strict=True))

    def share(self, whole: Any) -> list[Any]:
        """What is the same on all devices, as each layer uses it."""
        entered = self.shards.enter(whole)
        return [whole if axes == WHOLE else entered for axes in self.inner.axes()]


def plain(network: Network, weights: Weights, x: Float[Array, "R K"], norm: NormWeights | None) -> Array:
    """f(x; W) at fixed weights, rows [R K]."""
    return network.inner(lambda i, z: network.result(i, times(network.rows(i, z), weights[i])), x, norm)


def linearise(
    network: Network,
    loss: InnerLoss,
    weights: Weights,
    k_CK: Float[Array, "C K"],
    v_CK: Float[Array, "C K"],
    norm: NormWeights | None,
) -> tuple[Gradients, Float[Array, " C"]]:
    """Each token's gradient at given weights, as outer products, and its loss.

    The derivative by a layer's output is that by an array of zeros that is added to it: one backward pass for the
    whole chunk, whatever network and loss are.
    """

    def total(taps: tuple[Array, ...]) -> tuple[Array, tuple[tuple[Array, ...], Array]]:
        inputs: dict[int, Array] = {}

        def linear(i: int, z: Array) -> Array:
            if i in inputs:
                raise ValueError(f"{type(network.inner).__name__} calls layer {i} twice")
            inputs[i] = network.rows(i, z)
            return network.result(i, times(inputs[i], weights[i])) + taps[i]

        loss_C = loss(network.inner(linear, k_CK, norm), v_CK)
        return loss_C.sum(), (tuple(inputs[i] for i in range(len(weights))), loss_C)

    taps = tuple(jnp.zeros((k_CK.shape[0], w.shape[1]), k_CK.dtype) for w in weights)
    outputs, (inputs, loss_C) = jax.grad(total, has_aux=True)(taps)
    whole = [axes == FROM_HIDDEN for axes in network.inner.axes()]
    outputs = tuple(network.shards.enter(g) if enters else g for g, enters in zip(outputs, whole, strict=True))
    return Gradients(inputs, outputs), loss_C


def scaled(z_RI: Float[Array, "R I"], a_R: Float[Array, " R"], w_IO: Float[Array, "I O"]) -> Float[Array, "R O"]:
    """diag(a) z W; the factor is put where there is less to multiply."""
    if w_IO.shape[0] < w_IO.shape[1]:
        return times(a_R[:, None] * z_RI, w_IO)
    return a_R[:, None] * times(z_RI, w_IO)


def outer(x_CI: Float[Array, "C I"], a_C: Float[Array, " C"], g_CO: Float[Array, "C O"]) -> Float[Array, "I O"]:
    """x^T diag(a) g; likewise."""
    if x_CI.shape[1] < g_CO.shape[1]:
        return t_times(a_C[:, None] * x_CI, g_CO)
    return t_times(x_CI, a_C[:, None] * g_CO)


def recall(
    network: Network,
    fast: Fast,
    gradients: Gradients,
    there: Presence,
    q_RK: Float[Array, "R K"],
    norm: NormWeights | None,
) -> Float[Array, "R K"]:
    """f(q_t; W_t): each row asks the weights behind its own token.

    Args:
      network: f.
      fast: W_0 and S_0.
      gradients: of the chunk's C tokens at W_0.
      there: rows of A, b and P for the R asking tokens.
      q_RK: queries.
      norm: the network's slow parameters.
    """
    present = network.share(there)

    def linear(i: int, z: Array) -> Array:
        z, there = network.rows(i, z), present[i]
        y = scaled(z, there.start, fast.weights[i])
        if fast.momentum is not None:
            y = y + scaled(z, there.momentum, fast.momentum[i])
        y = y - times(there.gradient * times_t(z, gradients.inputs[i]), gradients.outputs[i])
        return network.result(i, y)

    return network.inner(linear, q_RK, norm)


def advance(network: Network, fast: Fast, gradients: Gradients, weights: Presence, momentum: Presence) -> Fast:
    """W_C and S_C, behind the whole chunk.

    Args:
      network: whose they are.
      fast: W_0 and S_0.
      gradients: of the chunk's tokens at W_0.
      weights: all rows of A, b and P.
      momentum: the same of the momentum.
    """
    ends = network.share((rows_of(weights, -1), rows_of(momentum, -1)))
    new, new_momentum = [], []
    for i, (x_CI, g_CO) in enumerate(zip(gradients.inputs, gradients.outputs, strict=True)):
        end, end_momentum = ends[i]
        w = end.start * fast.weights[i] - outer(x_CI, end.gradient, g_CO)
        if fast.momentum is not None:
            w = w + end.momentum * fast.momentum[i]
            kept = end_momentum.momentum * fast.momentum[i]
            new_momentum.append(kept - outer(x_CI, end_momentum.gradient, g_CO))
        new.append(w)
    return Fast(tuple(new), None if fast.momentum is None else tuple(new_momentum))


def surprise(network: Network, gradients: Gradients) -> Float[Array, "*lead C"]:
    """Norm of each token's gradient by all weights: the outer product's norm is the product of the norms."""
    layers = zip(gradients.inputs, gradients.outputs, network.inner.axes(), strict=True)
    squares = [(jnp.sum(x * x, axis=-1) * jnp.sum(g * g, axis=-1), axes) for x, g, axes in layers]
    whole = [square for square, axes in squares if axes == WHOLE]
    parts = [square for square, axes in squares if axes != WHOLE]
    return jnp.sqrt(sum([network.shards.leave(sum(parts[1:], parts[0]))] if parts else [], sum(whole)))


def plain_scan(step: Step, carry: Any, inputs: Any, group: int) -> tuple[Any, Any]:
    """`jax.lax.scan`: the backward pass keeps all that each step made."""
    return jax.lax.scan(step, carry, inputs)


def chunk_scan(step: Step, carry: Any, inputs: Any, group: int) -> tuple[Any, Any]:
    """A scan whose backward pass keeps each step's carry and makes the rest again."""
    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), carry, inputs)


def grouped_scan(step: Step, carry: Any, inputs: Any, group: int) -> tuple[Any, Any]:
    """A scan whose backward pass keeps the carry of every `group`-th step and makes the others and the rest again.

    With n steps in groups of sqrt(n), memory for the backward pass grows with sqrt(n), for two more forward passes.

    Args:
      step: of the scan.
      carry: before the first step.
      inputs: leaves [n ...], n a multiple of `group`.
      group: steps of a group.
    """
    steps = jax.tree.leaves(inputs)[0].shape[0]
    inputs = jax.tree.map(lambda a: a.reshape(steps // group, group, *a.shape[1:]), inputs)
    inner = jax.checkpoint(lambda carry, xs: chunk_scan(step, carry, xs, group), prevent_cse=False)
    carry, outputs = jax.lax.scan(inner, carry, inputs)
    return carry, jax.tree.map(lambda a: a.reshape(steps, *a.shape[2:]), outputs)


def group_of(steps: int) -> int:
    """Steps of a group in `grouped_scan`: about the root of all, a divisor where there is one near it."""
    root = max(1, int(steps**0.5))
    near = [d for d in range(root, 2 * root + 1) if steps % d == 0]
    return near[0] if near else root
