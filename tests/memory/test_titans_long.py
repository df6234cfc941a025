"""Long texts: weights stay bounded, and the backward pass keeps about the root of all chunks."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from lm2_jax.memory.titans import GateConfig, StepConfig, TitansConfig
from lm2_jax.ops.ttt_chunk.chunk import ChunkInputs, ChunkSpec, FastWeights, Network, Rates
from lm2_jax.ops.ttt_chunk.networks import LinearNetwork, MlpNetwork, SquaredError
from lm2_jax.ops.ttt_chunk.sharded import ttt_chunk
from lm2_jax.precision import Precision
from tests.memory import driver


def backward_bytes(chunks: int, remat: str) -> int:
    """Temporary memory of the gradient of a linear memory whose weights far outweigh its one token per chunk."""
    K = 32

    def total(fast, tokens):
        spec = ChunkSpec(Network(LinearNetwork()), SquaredError(), 1, (False, False, False))
        after, y, _ = ttt_chunk(spec, None, None, fast, tokens, remat)
        return jnp.sum(y * y) + jnp.sum(after.weights[0])

    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, jnp.float32)

    rates = Rates(*(shape(1, chunks, 1) for _ in range(3)))
    tokens = ChunkInputs(*(shape(1, chunks, 1, K) for _ in range(3)), rates, jax.ShapeDtypeStruct((1, chunks), bool))
    fast = FastWeights((shape(1, 1, K, K),), (shape(1, 1, K, K),))
    compiled = jax.jit(jax.grad(total, argnums=(0, 1), allow_int=True)).lower(fast, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_the_backward_pass_grows_with_the_root():
    """16 times as many chunks: four times the memory; without groups the weights of all chunks are kept."""
    few, many = backward_bytes(16, remat="groups"), backward_bytes(256, remat="groups")
    assert many < 6 * few
    assert backward_bytes(256, remat="chunks") > 3 * many


def outer_gradient(config: TitansConfig, T: int = 1024, D: int = 64) -> float:
    """Norm of the gradient of mean square answers by all parameters, where training starts; words come again."""
    memory, rng = config.build(D, Precision()), np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((50, D), np.float32)[rng.integers(0, 50, (1, T))])
    valid, state = jnp.ones((1, T), bool), memory.init_state(1)
    params = nn.unbox(jax.jit(driver.init(memory))(jax.random.key(0), x[:, :16], state, valid[:, :16]))
    grads = jax.jit(
        jax.grad(lambda params: jnp.mean(memory.apply(params, x, state, valid, method=driver.call)[0] ** 2))
    )(params)
    return float(optax.tree.norm(grads))


@pytest.mark.slow
def test_gradients_through_many_chunks_stay_moderate():
    """With a norm that knows no size, and half of the weights forgotten every 38 tokens, they grow with each chunk."""
    config = TitansConfig()
    assert outer_gradient(config) < 3
    scale_free = dataclasses.replace(
        config, network=MlpNetwork(norm_epsilon=1e-6), step=StepConfig(bias=0.0), forget=GateConfig(bias=-4.0)
    )
    assert outer_gradient(scale_free) > 300


def noise(T: int, D: int, folder: Callable[[], Path]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, T, D), np.float32)


def book(T: int, D: int, folder: Callable[[], Path]) -> np.ndarray:
    """Characters, each a random row: keys repeat and are similar."""
    text = next(path for path in sorted((folder() / "books").glob("*.txt")) if path.stat().st_size > 2 * T)
    table = np.random.default_rng(0).standard_normal((256, D), np.float32)
    return table[np.frombuffer(text.read_bytes()[T // 2 :][:T], np.uint8)][None]


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("text", [noise, book])
def test_weights_stay_bounded_over_64k_tokens(text, compute, request):
    """At the parameters that training starts from, state and gates in float32."""
    T, D = 65_536, 32
    memory = TitansConfig(num_heads=2).build(D, Precision(compute=compute))
    x = jnp.asarray(text(T, D, lambda: request.getfixturevalue("data_dir")), compute)
    valid, state = jnp.ones((1, T), bool), memory.init_state(1)
    params = nn.unbox(jax.jit(driver.init(memory))(jax.random.key(0), x[:, :16], state, valid[:, :16]))

    @jax.jit
    def call(params, x, state):
        metrics: dict = {}
        return *memory.apply(params, x, state, valid, metrics, method=driver.call), metrics

    y, after, metrics = call(params, x, state)
    assert y.dtype == jnp.dtype(compute)
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves((y, after, metrics)))
    assert {leaf.dtype for leaf in (*after.weights, *after.momentum)} == {jnp.dtype(jnp.float32)}
    assert max(np.abs(w).max() for w in after.weights) < 20
    assert metrics["inner_loss_after"] < metrics["inner_loss_before"]
