"""The reference: Titans' update one token at a time, as its equations define it (arXiv:2501.00663).

It shares no code with the chunked form. Run it in float64.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm2_jax.types import Array


def linear(weights: Sequence[Array], x_K: Array, norm: Any) -> Array:
    """f(x) = x W."""
    return x_K @ weights[0]


def mlp(weights: Sequence[Array], x_K: Array, norm: Any) -> Array:
    """f(x) = x + LN(gelu(x W1) W2), with gelu's tanh formula and 1 added to the variance."""
    scale_K, shift_K = norm
    z = x_K @ weights[0]
    z = 0.5 * z * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (z + 0.044715 * z**3))) @ weights[1]
    return x_K + (z - z.mean()) / jnp.sqrt(z.var() + 1) * scale_K + shift_K


def squared_error(y_K: Array, target_K: Array) -> Array:
    """|y - target|^2."""
    return jnp.sum((y_K - target_K) ** 2)


def token_loop(
    fn: Callable[..., Array],
    weights: Sequence[Array],
    momentum: Sequence[Array],
    norm: Any,
    tokens: dict[str, Array],
    chunk_tokens: int | Array,
    loss: Callable[[Array, Array], Array] = squared_error,
) -> tuple[Array, Sequence[Array], Sequence[Array]]:
    """All tokens of one head.

        u_t = dl/dW at the weights before the chunk of t
        S_t = e_t S_{t-1} - theta_t u_t,   W_t = a_t W_{t-1} + S_t,   y_t = f(q_t; W_t)

    Args:
      fn: `fn(weights, x_K, norm)`, f for one token.
      weights: W_0, one matrix per layer.
      momentum: S_0, one matrix per layer.
      norm: parameters of `fn` that are not trained here.
      tokens: q, k, v [T K], theta, e, a, valid [T]; a token that is not valid changes neither W nor S.
      chunk_tokens: tokens per chunk.
      loss: `loss(fn(k), v)` of one token.
    Returns:
      y [T K], and W and S after the last token.
    """

    def step(carry: Any, token: dict[str, Array]) -> tuple[Any, Array]:
        weights, momentum, anchor, t = carry
        anchor = [jnp.where(t % chunk_tokens == 0, w, old) for w, old in zip(weights, anchor, strict=True)]
        u = jax.grad(lambda weights: loss(fn(weights, token["k"], norm), token["v"]))(anchor)
        new_momentum = [token["e"] * s - token["theta"] * g for s, g in zip(momentum, u, strict=True)]
        new_weights = [token["a"] * w + s for w, s in zip(weights, new_momentum, strict=True)]
        momentum = [jnp.where(token["valid"], new, old) for new, old in zip(new_momentum, momentum, strict=True)]
        weights = [jnp.where(token["valid"], new, old) for new, old in zip(new_weights, weights, strict=True)]
        return (weights, momentum, anchor, t + 1), fn(weights, token["q"], norm)

    (weights, momentum, _, _), y_TK = jax.lax.scan(step, (list(weights), list(momentum), list(weights), 0), tokens)
    return y_TK, weights, momentum
