import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lm2_jax
from lm2_jax.layers import Einsum, Embed, RMSNorm, SwiGLU, constrain, rotate
from lm2_jax.parameters import DeclaredParameter, Role, named
from lm2_jax.precision import Precision, at_least_float32
from lm2_jax.rope import Llama3Scaling, rope_frequencies
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from tests.contract.subjects import abstract_params

PRECISION = Precision()
RULES = (("batch", "data"), ("embed", None))


def test_constrain_refuses_a_wrong_rank_without_any_rules():
    with pytest.raises(ValueError, match=r"2 axes .* shape \(3, 4, 5\)"):
        constrain(jnp.zeros((3, 4, 5)), ("batch", "embed"))


def test_constrain_refuses_an_unknown_name_under_rules():
    with Layout(make_mesh(MeshConfig(), jax.devices()[:1]), RULES).context():
        assert constrain(jnp.zeros((3, 4)), ("batch", "embed")).shape == (3, 4)
        with pytest.raises(ValueError, match="slotz"):
            constrain(jnp.zeros((3, 4)), ("batch", "slotz"))


def test_einsum_names_one_axis_per_dimension():
    layer = Einsum((5, 2, 3), ("embed", "heads", "head"), PRECISION)
    boxed = jax.eval_shape(lambda: layer.init(jax.random.key(0), "btd,dhk->bthk", jnp.zeros((1, 4, 5))))
    (kernel,) = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    assert isinstance(kernel, DeclaredParameter)
    assert (kernel.role, kernel.in_dims) == (Role.WEIGHT, 1)
    assert kernel.names == ("embed", "heads", "head")
    assert kernel.value.shape == (5, 2, 3)


def test_a_constant_start_is_a_jax_array_in_every_trace():
    """Newer versions of Linen evaluate the trace of a scan, where a constant would come out as a numpy array."""
    found = []

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, carry, _):
            init = named(lambda *_: jnp.asarray(np.eye(3, dtype=np.float32)), ("slots", "embed"), Role.START)
            start = self.param("start", init, (3, 3), jnp.float32)
            found.append(isinstance(start, jax.Array))
            return carry + start, None

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            step = nn.scan(Inner, variable_broadcast="params", split_rngs={"params": False}, length=2)
            return step()(x, None)[0]

    shapes = jax.eval_shape(Outer().init, jax.random.key(0), jnp.zeros((3, 3)))
    assert [leaf.shape for leaf in jax.tree.leaves(nn.unbox(shapes))] == [(3, 3)]
    assert found
    assert all(found)


def test_einsum_equals_the_plain_product():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 4, 2, 3)).astype(np.float32), rng.standard_normal((2, 3, 5)).astype(np.float32)
    layer = Einsum(w.shape, ("heads", "head", "embed"), PRECISION, in_dims=2)
    got = layer.apply({"params": {"w": jnp.asarray(w)}}, "bthk,hkd->btd", jnp.asarray(x))
    np.testing.assert_allclose(got, np.tensordot(x, w, 2), rtol=1e-5, atol=1e-6)


def test_einsum_starts_at_unit_variance():
    x = jnp.ones((1, 1, 400))
    layer = Einsum((400, 300), ("embed", "mlp"), PRECISION, scale=2.0)
    w = nn.unbox(layer.init(jax.random.key(0), "btd,df->btf", x))["params"]["w"]
    assert float(w.std()) == pytest.approx(2 / 20, rel=0.02)


def test_rms_norm_by_hand():
    norm = RMSNorm(PRECISION, epsilon=0.0)
    y = norm.apply({"params": {"scale": jnp.array([1.0, 2.0])}}, jnp.array([[3.0, 4.0]]))
    np.testing.assert_allclose(y, [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-6)


def test_rms_norm_is_computed_in_float32():
    """256 entries of 300 in bfloat16: their squares would lose their last bits, their mean is still exact."""
    norm = RMSNorm(Precision(compute="bfloat16"), epsilon=0.0)
    y = norm.apply({"params": {"scale": jnp.ones(256)}}, jnp.full((1, 256), 301.0, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), np.ones((1, 256)))


@pytest.mark.parametrize("name", ["lm2_context_tiny", "titans_mal_tiny"])
def test_the_epsilon_of_a_run_is_that_of_the_norms_around_its_memory(name):
    config = lm2_jax.preset(name).model
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, norm_epsilon=0.25))
    found = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, RMSNorm):
            found["/".join(context.module.path)] = context.module.epsilon
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        abstract_params(lm2_jax.build_model(config))
    inside = {path for path in found if "/memory/" in path or "/combine/" in path}
    assert {found[path] for path in inside} == {1e-5}, found
    assert {found[path] for path in found.keys() - inside} == {0.25}, found


def test_swiglu_by_hand():
    layer = SwiGLU(1, 1, PRECISION)
    params = {name: {"w": jnp.full((1, 1), w)} for name, w in (("gated", 2.0), ("up", 3.0), ("down", 5.0))}
    silu = 4 / (1 + np.exp(-4))
    np.testing.assert_allclose(layer.apply({"params": params}, jnp.full((1, 1), 2.0)), [[5 * silu * 6]], rtol=1e-6)


def test_the_tied_head_is_the_transpose_of_the_embedding():
    table = jnp.arange(12.0).reshape(4, 3)
    embed = Embed(4, 3, PRECISION)
    x = embed.apply({"params": {"table": table}}, jnp.array([[2, 0]]))
    np.testing.assert_array_equal(x, [[[6, 7, 8], [0, 1, 2]]])
    logits = embed.apply({"params": {"table": table}}, x, method="attend")
    np.testing.assert_allclose(logits, x @ table.T)


def test_types_of_at_least_float32():
    assert [at_least_float32(t) for t in ("bfloat16", "float32", "float64")] == ["float32", "float32", "float64"]


def test_rotate_by_hand():
    """A quarter turn takes (1, 0) to (0, 1): the pair is the first entry of each half."""
    x = jnp.array([[[1.0, 5.0, 0.0, 7.0]]])
    turned = rotate(x, jnp.array([1]), np.array([np.pi / 2, 0.0]))
    np.testing.assert_allclose(turned, [[[0, 5, 1, 7]]], atol=1e-6)


def test_scores_of_rotated_vectors_depend_on_the_distance_only():
    rng, frequencies = np.random.default_rng(0), rope_frequencies(8, 100.0, None)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 8)), jnp.float32) for _ in range(2))

    def score(i, j):
        return float(jnp.sum(rotate(q, jnp.array([i]), frequencies) * rotate(k, jnp.array([j]), frequencies)))

    assert score(9, 4) == pytest.approx(score(5, 0), abs=1e-5)
    assert score(3, -2) == pytest.approx(score(5, 0), abs=1e-5)
    assert score(-1, -6) == pytest.approx(score(5, 0), abs=1e-5)
    assert abs(score(6, 0) - score(5, 0)) > 1e-2


def test_rotate_takes_positions_per_row():
    rng, frequencies = np.random.default_rng(0), rope_frequencies(4, 100.0, None)
    x = jnp.asarray(rng.standard_normal((2, 3, 5, 4)), jnp.float32)
    positions = jnp.array([[0, 1, 2], [7, 3, -4]])
    together = rotate(x, positions, frequencies)
    for row in range(2):
        np.testing.assert_allclose(together[row], rotate(x[row], positions[row], frequencies), rtol=1e-6)
    np.testing.assert_array_equal(together[0, 0], x[0, 0])


def test_rotate_keeps_lengths_and_types():
    x = jnp.ones((3, 2, 4), jnp.bfloat16)
    turned = rotate(x, jnp.arange(3), rope_frequencies(4, 100.0, None))
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.sum(turned.astype(jnp.float32) ** 2, -1), np.full((3, 2), 4), rtol=1e-2)


def test_frequencies_by_hand():
    np.testing.assert_allclose(rope_frequencies(4, 10_000.0, None), [1, 0.01])


def test_llama_3_frequencies():
    """Those of Llama 3.1 (theta 500,000, head width 128): kept, blended and divided by 8, as published."""
    scaling = Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_tokens=8192)
    plain, scaled = rope_frequencies(128, 500_000.0, None), rope_frequencies(128, 500_000.0, scaling)
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert between.sum() > 3
    blend = (8192 / wavelength[between] - 1) / (4 - 1)
    np.testing.assert_allclose(scaled[between], (1 - blend) * plain[between] / 8 + blend * plain[between])
    assert (np.diff(scaled) < 0).all()
