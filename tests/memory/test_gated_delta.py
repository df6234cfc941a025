"""The gated delta rule against loops over tokens, heads and rows in numpy, float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm2_jax.blocks.gate import GateJoin
from lm2_jax.config import ModelConfig
from lm2_jax.memory.base import Capability, TokenInputs
from lm2_jax.memory.gated_delta import Delta, GatedDeltaConfig, chunked, recurrent
from tests.contract.subjects import FLOAT64

B, T, H, K, V = 2, 23, 3, 4, 4


def tokens(reset: bool = False) -> tuple[Delta, np.ndarray]:
    """Random tokens with strong and weak decay, some of them padding, and a state."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, T, H, n)) for n in (K, K, V))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    log_decay = -np.exp(2 * rng.standard_normal((B, T, H)))
    rate = 1 / (1 + np.exp(-rng.standard_normal((B, T, H))))
    padding = rng.random((B, T)) < 0.2
    log_decay[padding], rate[padding] = 0, 0
    resets = (rng.random((B, T)) < 0.15) & reset
    return Delta(q, k, v, log_decay, rate, resets), rng.standard_normal((B, H, K, V))


def loop(t: Delta, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S <- exp(g) S; d = b (v - k^T S); S <- S + k d^T; y = q^T S / sqrt(K): flash-linear-attention's definition."""
    state, y = state.copy(), np.zeros((B, T, H, V))
    for b in range(B):
        for i in range(T):
            for h in range(H):
                s = np.zeros((K, V)) if t.reset[b, i] else state[b, h]
                s = np.exp(t.log_decay[b, i, h]) * s
                d = t.rate[b, i, h] * (t.v[b, i, h] - t.k[b, i, h] @ s)
                s = s + np.outer(t.k[b, i, h], d)
                state[b, h], y[b, i, h] = s, (t.q[b, i, h] / np.sqrt(K)) @ s
    return y, state


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 8, 23, 64])
def test_both_forms_equal_the_definition(chunk_tokens, reset):
    inputs, state = tokens(reset)
    expected, after = loop(inputs, state)
    with jax.enable_x64(True):
        args = jax.tree.map(jnp.asarray, (inputs, state))
        y, got = recurrent(*args) if chunk_tokens is None else chunked(*args, chunk_tokens)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got, after, rtol=1e-9, atol=1e-9)


def test_the_definition_by_hand():
    """One key: 2 is written at rate 1, halved by the decay, then corrected halfway to 5: 1 + (5 - 1) / 2."""
    one, pair = jnp.ones((1, 2, 1, 1)), lambda *values: jnp.asarray(values, jnp.float32).reshape(1, 2, 1)
    inputs = Delta(one, one, pair(2, 5)[..., None], pair(0, np.log(0.5)), pair(1, 0.5), jnp.zeros((1, 2), bool))
    for form in (recurrent, lambda *a: chunked(*a, 2)):
        y, state = form(inputs, jnp.zeros((1, 1, 1, 1)))
        np.testing.assert_allclose(y.ravel(), [2, 3], rtol=1e-6)
        np.testing.assert_allclose(state.ravel(), [3], rtol=1e-6)


def test_gradients_of_both_forms_agree():
    inputs, state = tokens()
    weight = np.random.default_rng(1).standard_normal((B, T, H, V))

    def gradient(form):
        floats = (inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.rate, state)
        loss = lambda *a: jnp.sum(weight * form(Delta(*a[:5], jnp.zeros((B, T), bool)), a[5])[0])  # noqa: E731
        return jax.grad(loss, argnums=range(6))(*map(jnp.asarray, floats))

    with jax.enable_x64(True):
        for a, b in zip(gradient(recurrent), gradient(lambda *x: chunked(*x, 8)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_the_module_in_pieces_with_padding_equals_one_call():
    """Tails of the convolutions, rates and decays included; a piece of one token takes the recurrent form."""
    config = GatedDeltaConfig(num_heads=2, chunk_tokens=4)
    with jax.enable_x64(True):
        module = config.build(8, FLOAT64)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((B, 11, 8)))
        valid = jnp.ones((B, 11), bool).at[0, 8:].set(False)
        state = module.init_state(B)
        params = nn.unbox(module.init(jax.random.key(0), TokenInputs(x, valid), state, method="advance"))
        y, after = module.apply(params, TokenInputs(x, valid), state, method="advance")
        pieces, first = [], 0
        for length in (1, 4, 1, 5):
            piece = TokenInputs(x[:, first : first + length], valid[:, first : first + length])
            out, state = module.apply(params, piece, state, method="advance")
            pieces.append(out)
            first += length
    seen = np.asarray(valid)[:, :, None]
    np.testing.assert_allclose(np.where(seen, np.concatenate(pieces, axis=1), 0), np.where(seen, y, 0), atol=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), state, after)


def test_packed_documents_are_taken_where_no_convolution_reaches_over_their_border():
    config = GatedDeltaConfig()
    assert Capability.PACKED not in config.capabilities
    config = dataclasses.replace(config, conv_tokens=0)
    assert Capability.PACKED in config.capabilities
    assert ModelConfig(memory=config, join=GateJoin()).takes_packed
    assert not ModelConfig(memory=config, join=GateJoin(num_persistent=2)).takes_packed
