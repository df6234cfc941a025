"""TTT-Linear and TTT-MLP as configurations of the Titans memory, against their published dual form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm2_jax.memory.ttt import ttt_linear, ttt_mlp
from lm2_jax.precision import Precision
from tests.contract.subjects import FLOAT64, UNOPTIMIZED
from tests.memory import driver

B, T, H, K, C = 1, 8, 2, 4, 4
D = H * K


def gelu(z):
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def gelu_slope(z):
    inside = np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)
    return 0.5 * (1 + np.tanh(inside)) + 0.5 * z * (1 - np.tanh(inside) ** 2) * slope


def unit_rows(z):
    centered = z - z.mean(-1, keepdims=True)
    deviation = np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
    return centered / deviation, deviation


def norm(z, scale, shift):
    return unit_rows(z)[0] * scale + shift


def norm_backward(z, dy, scale):
    x, deviation = unit_rows(z)
    dx = dy * scale
    return (dx - dx.mean(-1, keepdims=True) - x * (dx * x).mean(-1, keepdims=True)) / deviation


def linear_batch(w, q, k, v, eta, slow):
    """One mini-batch of TTT-Linear; w is [weights, bias]."""
    (w1, c1), below = w, np.tril(eta)
    z1 = k @ w1 + c1
    g = norm_backward(z1, norm(z1, *slow) - (v - k), slow[0])
    found = q @ w1 + c1 - (below * (q @ k.T)) @ g - below @ g
    return q + norm(found, *slow), [w1 - (eta[-1][:, None] * k).T @ g, c1 - eta[-1] @ g]


def mlp_batch(w, q, k, v, eta, slow):
    """One mini-batch of TTT-MLP."""
    (w1, c1, w2, c2), below = w, np.tril(eta)
    z1 = k @ w1 + c1
    x2 = gelu(z1)
    z2 = x2 @ w2 + c2
    g2 = norm_backward(z2, norm(z2, *slow) - (v - k), slow[0])
    g1 = (g2 @ w2.T) * gelu_slope(z1)
    hidden = gelu(q @ w1 + c1 - (below * (q @ k.T)) @ g1 - below @ g1)
    found = hidden @ w2 + c2 - (below * (hidden @ x2.T)) @ g2 - below @ g2
    last = eta[-1][:, None]
    after = [w1 - (last * k).T @ g1, c1 - eta[-1] @ g1, w2 - (last * x2).T @ g2, c2 - eta[-1] @ g2]
    return q + norm(found, *slow), after


@pytest.mark.parametrize(("make", "batch", "base"), [(ttt_linear, linear_batch, 1.0), (ttt_mlp, mlp_batch, 0.1)])
def test_it_is_the_published_dual_form(make, batch, base):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        memory = make(K, num_heads=H, chunk_tokens=C, output_norm=False, output_gate="none").build(D, FLOAT64)
        x, state, valid = jnp.asarray(rng.standard_normal((B, T, D))), memory.init_state(B), jnp.ones((B, T), bool)
        shapes = nn.unbox(jax.eval_shape(driver.init(memory), jax.random.key(0), x, state, valid))
        params = jax.tree.map(lambda leaf: jnp.asarray(0.7 * rng.standard_normal(leaf.shape)), shapes)
        y, after = jax.jit(functools.partial(memory.apply, method=driver.call), compiler_options=UNOPTIMIZED)(
            params, x, state, valid
        )
    p, x_TD = jax.tree.map(np.asarray, params["params"]), np.asarray(x[0])
    want = 0
    for h in range(H):
        q, k, v = (x_TD @ p[name]["w"]["w"][:, h] for name in "qkv")
        gate = 1 / (1 + np.exp(-(x_TD @ p["gate_step"]["w"]["w"][:, h] + p["gate_step"]["b"]["b"][h])))
        rows = np.maximum(0, 1 / np.arange(1, C + 1) + p["place"]["b"])
        slow = p["inner_norm"]["scale"][h], p["inner_norm"]["b"][h]
        w = [part for name in sorted(p) if name.startswith("start") for part in (p[name][h][:-1], p[name][h][-1])]
        answers = []
        for first in range(0, T, C):
            here = slice(first, first + C)
            answer, w = batch(w, q[here], k[here], v[here], np.outer(rows, base * gate[here] / K), slow)
            answers.append(answer)
        want = want + np.concatenate(answers) @ p["o"]["w"][h]
        for i, weights in enumerate(after.weights):
            np.testing.assert_allclose(weights[0, h, :-1], w[2 * i], rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(weights[0, h, -1], w[2 * i + 1], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(y[0], want, rtol=1e-9, atol=1e-9)


def test_there_is_no_momentum_and_no_forgetting():
    config = ttt_mlp(4, num_heads=2)
    assert (config.momentum.per, config.forget.per, config.conv_tokens) == ("off", "off", 0)
    assert config.build(8, Precision()).init_state(1).momentum is None
    assert config.step.maximum == pytest.approx(0.1 / 4)
    assert ttt_linear(4).network.shapes(4) == ((4, 4),)


def test_start_weights_have_the_published_deviation_but_for_the_second_matrix():
    """0.02, and with four times the inputs half of that."""
    width = 32
    memory = ttt_mlp(width, num_heads=2).build(2 * width, Precision())
    x, state = jnp.zeros((1, 16, 2 * width)), memory.init_state(1)
    start = nn.unbox(jax.jit(driver.init(memory))(jax.random.key(0), x, state, jnp.ones((1, 16), bool)))["params"]
    deviations = [float(start[f"start_{layer}"][:, :-1].std()) for layer in (0, 1)]
    assert deviations == pytest.approx([0.02, 0.01], rel=0.05)
