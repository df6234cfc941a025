"""TTT-Linear and TTT-MLP layers of the authors' code on random weights; golden/README.md says how they were run.

Ours is the training at test time between the projections and the norm of the output. RoPE inside a mini-batch, and the
norm over all heads, which our layers do not have, are applied here.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax.memory.ttt import ttt_linear, ttt_mlp
from lm2_jax.ops.ttt_chunk.chunk import ChunkInputs, FastWeights, Rates
from lm2_jax.ops.ttt_chunk.networks import NormWeights
from lm2_jax.ops.ttt_chunk.sharded import ttt_chunk

B, T, H, K, C = 2, 12, 2, 4, 4
D = H * K
LAYERS = {"linear": (ttt_linear, 1.0), "mlp": (ttt_mlp, 0.1)}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotated(x_BTHK):
    """RoPE of the pairs (2i, 2i + 1) by the place in the mini-batch."""
    angles = np.arange(T)[:, None] % C * 10_000.0 ** (-2 * np.arange(K // 2) / K)
    turned = (x_BTHK[..., 0::2] + 1j * x_BTHK[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(B, T, H, K)


def weights_of(arrays, start, count, shape):
    """Our matrices, of which the last row is the bias."""
    return tuple(
        jnp.asarray(np.concatenate([arrays[f"{start}W{i}{shape}"], arrays[f"{start}b{i}{shape}"]], axis=-2))
        for i in range(1, count + 1)
    )


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_the_released_code(name):
    """What the trained network answers, its weights after the text, and the layer's output."""
    with np.load(Path(__file__).parent / "golden" / "ttt_official.npz") as stored:
        arrays = {key.removeprefix(f"{name}/"): stored[key] for key in stored.files if key.startswith(f"{name}/")}
    w = {key.removeprefix("weights/"): array for key, array in arrays.items()}
    make, base = LAYERS[name]
    config, x = make(K, num_heads=H, chunk_tokens=C), arrays["x"]
    q, k, v = ((x @ w[f"{name}_proj.weight"].T).reshape(B, T, H, K) for name in "qkv")
    step = base / K * sigmoid(x @ w["learnable_ttt_lr_weight"][:, 0].T + w["learnable_ttt_lr_bias"][:, 0])
    tokens = ChunkInputs(*(jnp.asarray(a, jnp.float32) for a in (rotated(q), rotated(k), v)),
                         Rates(jnp.asarray(step), None, None), jnp.ones((B, T), bool))  # fmt: skip
    count = len(config.network.shapes(K))
    start = jax.tree.map(lambda a: jnp.tile(a[None], (B, 1, 1, 1)), weights_of(w, "", count, ""))
    norm = NormWeights(jnp.asarray(w["ttt_norm_weight"]), jnp.asarray(w["ttt_norm_bias"]))
    scale = jnp.maximum(1 / jnp.arange(1, C + 1) + w["learnable_token_idx"], 0)
    assert config.step.maximum == pytest.approx(base / K)
    with jax.default_matmul_precision("highest"):
        after, y, _ = ttt_chunk(config.spec, norm, scale, FastWeights(start, None), tokens, "none")
    found = np.asarray(y).reshape(B, T, D)
    np.testing.assert_allclose(found, arrays["inner"], rtol=1e-4, atol=1e-4)
    for ours, theirs, first in zip(after.weights, weights_of(arrays, "after/", count, "_states"), start, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert np.abs(first - theirs).max() > 0.1, "it learned"
    centered = found - found.mean(-1, keepdims=True)
    unit = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
    normed = unit * w["post_norm.weight"] + w["post_norm.bias"]
    np.testing.assert_allclose(
        gelu(x @ w["g_proj.weight"].T) * normed @ w["o_proj.weight"].T, arrays["y"], rtol=1e-4, atol=1e-4
    )
