"""Learning rate, who decays, how fast who learns, and types of the optimizer's state."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lm2_jax
from lm2_jax.config import OptimConfig
from lm2_jax.model import LanguageModel
from lm2_jax.training.optim import kind_of, learning_rate, make_optimizer, map_parameters
from lm2_jax.training.state import make_plan


def test_learning_rate_by_hand():
    rate = learning_rate(OptimConfig(steps=110, warmup_steps=10, learning_rate=1.0, final_fraction=0.1))
    assert float(rate(0)) == pytest.approx(1 / 11)
    assert float(rate(4)) == pytest.approx(5 / 11)
    assert float(rate(10)) == pytest.approx(1.0)
    assert float(rate(60)) == pytest.approx(0.55), "half way down the cosine"
    assert float(rate(35)) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert float(rate(110)) == pytest.approx(0.1)


def test_without_warmup_the_peak_comes_first():
    assert float(learning_rate(OptimConfig(warmup_steps=0, learning_rate=0.5))(0)) == pytest.approx(0.5)


def kinds(name):
    """Kind of each parameter of a preset, by path."""
    config = lm2_jax.preset(name)
    axes = make_plan(config, LanguageModel(config.model)).axes.params
    found = map_parameters(kind_of, axes)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): kind
        for path, kind in jax.tree_util.tree_leaves_with_path(found)
    }


def test_kinds_of_the_gated_bank():
    found = kinds("lm2_tiny")
    assert {
        "embed/table": "matrix",
        "final_norm/scale": "norm",
        "blocks_0/attention_norm/scale": "norm",
        "blocks_0/mlp/gated/w": "matrix",
        "blocks_0/mlp/down/w": "matrix",
        "blocks_0/gate_output/w/w": "gate",
        "blocks_0/gate_output/b/b": "gate",
        "blocks_0/memory/writer/gate_forget/w/w": "gate",
        "blocks_0/memory/writer/gate_input/b/b": "gate",
        "blocks_0/memory/norm/scale": "norm",
    }.items() <= found.items()
    assert set(found.values()) <= {"matrix", "norm", "gate", "bias", "start", "vector"}


def test_learned_starts_are_starts():
    assert [path for path, kind in kinds("rmt_tiny").items() if kind == "start"] == ["carrier/memory/start"]


def test_a_stacked_vector_is_no_matrix():
    assert kind_of(("shift",), ("layers", "embed")) == "vector"
    assert kind_of(("shift",), ("embed", "embed")) == "matrix"


AXES = {
    "mlp": {"w": ("embed", "mlp")},
    "norm": {"scale": ("embed",)},
    "gate_output": {"w": ("embed", "embed")},
    "memory": {"q": {"w": ("embed", "embed")}, "start": ("slots", "embed"), "gate_input": {"w": ("embed", "embed")}},
}


def run_config(**optim):
    base = lm2_jax.preset("lm2_tiny")
    return dataclasses.replace(base, optim=dataclasses.replace(OptimConfig(steps=10, warmup_steps=0), **optim))


def first_update(config, grads, params):
    optimizer = make_optimizer(config, AXES)
    return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]


def ones():
    return map_parameters(lambda _, axes: jnp.ones([3] * len(axes)), AXES)


def zeros():
    return jax.tree.map(jnp.zeros_like, ones())


def test_only_matrices_decay():
    """With no gradient an update is nothing but decay: -rate * decay * parameter."""
    update = first_update(run_config(learning_rate=0.5, weight_decay=0.2), zeros(), ones())
    moved = {
        jax.tree_util.keystr(path): float(x.flatten()[0]) for path, x in jax.tree_util.tree_leaves_with_path(update)
    }
    assert moved == pytest.approx(
        {
            "['mlp']['w']": -0.1,
            "['memory']['q']['w']": -0.1,
            "['norm']['scale']": 0.0,
            "['gate_output']['w']": 0.0,
            "['memory']['start']": 0.0,
            "['memory']['gate_input']['w']": 0.0,
        }
    )


def test_gates_and_memory_learn_at_their_own_rates():
    """Adam's first update is the rate times the sign of the gradient."""
    config = run_config(learning_rate=1.0, weight_decay=0.0, gate_multiplier=0.25, memory_multiplier=3.0)
    update = first_update(config, ones(), zeros())
    expected = {"mlp": 1.0, "norm": 1.0, "gate_output": 0.25}
    for name, rate in expected.items():
        np.testing.assert_allclose(jax.tree.leaves(update[name])[0], -rate, rtol=1e-5)
    np.testing.assert_allclose(update["memory"]["q"]["w"], -3.0, rtol=1e-5)
    np.testing.assert_allclose(update["memory"]["start"], -3.0, rtol=1e-5)
    np.testing.assert_allclose(update["memory"]["gate_input"]["w"], -0.25, rtol=1e-5)


def test_clipping_bounds_the_whole_gradient():
    """What Adam sees is the clipped gradient: its first moment is (1 - beta1) of it."""
    config = run_config(clip_norm=0.5)
    optimizer = make_optimizer(config, AXES)
    _, state = optimizer.update(jax.tree.map(lambda x: 100 * x, ones()), optimizer.init(zeros()), zeros())
    moment = optax.tree.get(state, "mu")
    assert float(optax.tree.norm(moment)) == pytest.approx(0.5 * (1 - config.optim.beta1), rel=1e-5)


def test_types_of_the_moments():
    config = run_config()
    precision = dataclasses.replace(config.model.precision, params="bfloat16", moments="bfloat16")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, precision=precision))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), ones())
    optimizer = make_optimizer(config, AXES)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(state, "mu"))} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(state, "nu"))} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
