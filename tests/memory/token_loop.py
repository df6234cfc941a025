"""Titans one token at a time, as its equations stand: every token has weights of its own."""

from typing import Any

import jax
import jax.numpy as jnp


def norm(z, scale, shift):
    return (z - z.mean()) / jnp.sqrt(z.var() + 1) * scale + shift


def linear_map(weights, x, slow):
    return x @ weights[0]


def deep_map(weights, x, slow):
    """x + LN(gelu(x W1) W2), the gelu by its tangent formula."""
    z = x @ weights[0]
    z = 0.5 * z * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (z + 0.044715 * z**3)))
    return x + norm(z @ weights[1], *slow)


def squares(found, wanted):
    return jnp.sum((found - wanted) ** 2)


def by_token(fn: Any, weights, momentum, slow, tokens, chunk_tokens, loss: Any = squares):
    """One head.

        u_t = dl/dW at the weights before t's chunk,  S_t = e_t S_{t-1} - theta_t u_t,  W_t = a_t W_{t-1} + S_t,
        y_t = f(q_t; W_t)

    Args:
      fn: `fn(weights, x, slow)` of one token.
      weights: list of matrices before the text.
      momentum: the same.
      slow: what else `fn` needs.
      tokens: dict of q, k, v [T K], theta, e, a, valid [T]; a token that is not valid changes nothing.
      chunk_tokens: tokens of a chunk; may be traced.
    Returns:
      Answers [T K], weights and momentum behind the text.
    """

    def step(carry, token):
        weights, momentum, anchor, t = carry
        anchor = [jnp.where(t % chunk_tokens == 0, w, old) for w, old in zip(weights, anchor, strict=True)]
        u = jax.grad(lambda weights: loss(fn(weights, token["k"], slow), token["v"]))(anchor)
        new_momentum = [token["e"] * s - token["theta"] * g for s, g in zip(momentum, u, strict=True)]
        new_weights = [token["a"] * w + s for w, s in zip(weights, new_momentum, strict=True)]
        counts = token["valid"]
        momentum = [jnp.where(counts, new, old) for new, old in zip(new_momentum, momentum, strict=True)]
        weights = [jnp.where(counts, new, old) for new, old in zip(new_weights, weights, strict=True)]
        return (weights, momentum, anchor, t + 1), fn(weights, token["q"], slow)

    start = (list(weights), list(momentum), list(weights), 0)
    (weights, momentum, _, _), y = jax.lax.scan(step, start, tokens)
    return y, weights, momentum
