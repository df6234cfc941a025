"""Networks and losses that a neural memory trains at test time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm2_jax.config import from_dict, to_dict
from lm2_jax.memory import MemoryConfig
from lm2_jax.memory.titans import TitansConfig
from lm2_jax.memory.ttt import ttt_linear, ttt_mlp
from lm2_jax.ops.ttt_chunk.chunk import Network, apply_network, per_token_gradients
from lm2_jax.ops.ttt_chunk.networks import (
    HuberLoss,
    InnerLoss,
    InnerNetwork,
    LinearNetwork,
    MlpNetwork,
    NormWeights,
    PowerLoss,
    SquaredError,
    SwigluNetwork,
)
from lm2_jax.precision import Precision
from tests.contract.subjects import UNOPTIMIZED
from tests.memory import driver

C, K = 3, 4

NETWORKS = [
    LinearNetwork(),
    MlpNetwork(depth=1, bias=True),
    MlpNetwork(depth=3, expansion=2, norm=False),
    MlpNetwork(depth=2, expansion=1, residual=False),
    SwigluNetwork(),
]
LOSSES = [SquaredError(), HuberLoss(0.5), PowerLoss(3.0)]


def draw(network: InnerNetwork):
    rng = np.random.default_rng(0)
    shapes = [(i + network.has_bias, o) for i, o in network.shapes(K)]
    weights = tuple(jnp.asarray(rng.standard_normal(shape) / 2) for shape in shapes)
    k, v, scale, shift = (jnp.asarray(rng.standard_normal(shape)) for shape in ((C, K), (C, K), (K,), (K,)))
    return weights, k, v, NormWeights(scale, shift) if network.has_norm else None


@pytest.mark.parametrize(
    ("network", "loss"), [*[(n, LOSSES[0]) for n in NETWORKS], *[(NETWORKS[0], loss) for loss in LOSSES[1:]]]
)
def test_rows_of_inputs_and_outputs_are_the_gradient(network, loss):
    """The outer product of a row of X and of G is the gradient that autodiff gives for that token."""
    with jax.enable_x64(True):
        weights, k, v, norm = draw(network)

        def token(weights, k, v):
            return loss(apply_network(Network(network), weights, k[None], norm), v[None])[0]

        @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
        def both(weights, k, v):
            one_by_one = jax.vmap(jax.value_and_grad(token), in_axes=(None, 0, 0))(weights, k, v)
            return one_by_one, per_token_gradients(Network(network), loss, weights, k, v, norm)

        (losses, want), (rows, got) = both(weights, k, v)
        np.testing.assert_allclose(got, losses, rtol=1e-12)
        for x_CI, g_CO, want_CIO in zip(rows.inputs, rows.outputs, want, strict=True):
            np.testing.assert_allclose(x_CI[:, :, None] * g_CO[:, None], want_CIO, rtol=1e-10, atol=1e-12)


def test_losses_by_hand():
    """Errors of 0.5 and -3 against a parabola, Huber's with delta 1, and a cube."""
    found, wanted = jnp.asarray([[0.5, -3.0]]), jnp.zeros((1, 2))
    np.testing.assert_allclose(SquaredError()(found, wanted), [9.25])
    np.testing.assert_allclose(SquaredError(factor=0.5)(found, wanted), [4.625])
    np.testing.assert_allclose(HuberLoss(1.0)(found, wanted), [0.125 + 2.5])
    np.testing.assert_allclose(PowerLoss(3.0, 1e-12)(found, wanted), [27.125], rtol=1e-6)


def test_the_pull_of_an_outlier_is_bounded_by_hubers_delta():
    grad = jax.grad(lambda e: HuberLoss(0.7)(e[None], jnp.zeros((1, 3)))[0])(jnp.asarray([0.3, 50.0, -9.0]))
    np.testing.assert_allclose(grad, [0.3, 0.7, -0.7], rtol=1e-6)


def test_an_absolute_error_has_a_derivative_at_zero():
    grad = jax.grad(lambda e: PowerLoss(1.0)(e[None], jnp.zeros((1, 1)))[0])(jnp.zeros(1))
    assert np.isfinite(grad).all()


def test_shapes_by_depth():
    assert MlpNetwork(depth=1).shapes(4) == ((4, 4),)
    assert MlpNetwork(depth=2).shapes(4) == ((4, 16), (16, 4))
    assert MlpNetwork(depth=4, expansion=2).shapes(4) == ((4, 8), (8, 8), (8, 8), (8, 4))


def test_a_network_must_call_each_layer_once():
    @dataclasses.dataclass(frozen=True)
    class Twice(LinearNetwork):
        kind = "twice"

        def __call__(self, linear, x, norm):
            return linear(0, linear(0, x))

    try:
        with pytest.raises(ValueError, match="Twice calls layer 0 twice"):
            per_token_gradients(
                Network(Twice()), SquaredError(), (jnp.eye(K),), jnp.ones((C, K)), jnp.ones((C, K)), None
            )
    finally:
        del InnerNetwork.registry["twice"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (functools.partial(MlpNetwork, depth=0), "memory.network.depth"),
        (functools.partial(SwigluNetwork, expansion=0), "memory.network.expansion"),
        (functools.partial(MlpNetwork, norm_epsilon=0.0), "memory.network.norm_epsilon"),
        (functools.partial(SwigluNetwork, norm_epsilon=-1.0), "memory.network.norm_epsilon"),
        (functools.partial(HuberLoss, 0.0), "memory.loss.delta"),
        (functools.partial(PowerLoss, 0.5), "memory.loss.p"),
        (functools.partial(PowerLoss, 2.0, 0.0), "memory.loss.smoothing"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "config",
    [
        *[TitansConfig(network=network) for network in NETWORKS],
        *[TitansConfig(loss=loss) for loss in LOSSES],
        ttt_linear(16, num_heads=2),
        ttt_mlp(16, num_heads=2),
    ],
)
def test_a_run_can_use_it(config):
    """config.json holds it; the memory that it builds reads and updates its weights."""
    assert from_dict(MemoryConfig, to_dict(config)) == config
    memory = dataclasses.replace(config, num_heads=2, remat="none").build(8, Precision())
    x, valid, state = jnp.ones((1, 16, 8), jnp.float32), jnp.ones((1, 16), bool), memory.init_state(1)

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def weights_before_and_after(key):
        (y, after), variables = memory.init_with_output(key, x, state, valid, method=driver.call)
        return y, nn.unbox(variables)["params"]["start_0"][None], after.weights[0]

    y, before, after = weights_before_and_after(jax.random.key(0))
    assert np.isfinite(y).all()
    assert np.abs(after - before).max() > 1e-6


def test_families():
    assert set(InnerNetwork.registry) == {"linear", "mlp", "swiglu"}
    assert set(InnerLoss.registry) == {"squared", "huber", "power"}
