"""The model's own checks and sizes; what it computes is tested in contract/ and parity/."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import lm2_jax
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.config import ModelConfig
from lm2_jax.decoder import DecoderConfig
from lm2_jax.model import LayerGroup, layer_groups
from tests.contract.subjects import abstract_params

T = 32


@pytest.fixture
def unchecked_annotations():
    """As outside the tests: the model's own messages, not those of the annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def shapes(name: str, *, tokens=(2, 2 * T), rows: int = 2, method: str = "__call__", **arrays):
    """Traces a call with arrays of these shapes; nothing is computed."""
    model = lm2_jax.build_model(lm2_jax.preset(name).model)
    params = abstract_params(model)
    state = jax.eval_shape(lambda: model.init_state(rows))
    arrays = {key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype) in arrays.items()}

    def call(params, tokens, state, arrays):
        return model.apply({"params": params}, tokens, state, method=method, **arrays)

    return jax.eval_shape(call, params, jax.ShapeDtypeStruct(tokens, jnp.int32), state, arrays)


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("name", ["lm2_tiny", "rmt_tiny", "none_tiny"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": (2, T + 1)}, rf"full segments of model.segment_tokens={T}, got {T + 1} a row; use lm2_jax.stream"),
        ({"tokens": (2, 0)}, "got 0 a row"),
        ({"reset": ((2, 3), bool)}, r"reset must have shape \[B\]=\[2\] or \[B, K\]=\[2, 2\], got \[2, 3\]"),
        ({"reset": ((3,), bool)}, r"reset must have shape .* got \[3\]"),
        ({"valid": ((2, T), bool)}, rf"valid must have the shape of tokens, \[2, {2 * T}\], got \[2, {T}\]"),
        ({"document": ((2, T), jnp.int32), "method": "forward"}, rf"document must have the shape .* got \[2, {T}\]"),
    ],
)
def test_wrong_shapes_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        shapes(name, **arguments)


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("name", ["lm2_tiny", "lm2_threaded_tiny", "rmt_tiny"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_state_of_another_batch_is_refused(name, rows):
    with pytest.raises(ValueError, match=f"state has {rows} rows, tokens have 2; make it with init_state"):
        shapes(name, rows=rows)


@pytest.mark.usefixtures("unchecked_annotations")
def test_a_state_of_another_model_is_refused():
    model = lm2_jax.build_model(lm2_jax.preset("lm2_tiny").model)
    other = lm2_jax.build_model(lm2_jax.preset("rmt_tiny").model)
    tokens = jnp.zeros((2, T), jnp.int32)
    with pytest.raises(ValueError, match="state is not one of this model; make it with init_state"):
        jax.eval_shape(lambda p: model.apply({"params": p}, tokens, other.init_state(2)), abstract_params(model))


def test_a_batch_has_at_least_one_row():
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        lm2_jax.build_model(ModelConfig()).init_state(0)


def test_forward_gives_logits_on_demand_and_diagnostics_by_layer():
    out = shapes("lm2_tiny", method="forward")
    assert out.logits is None
    assert out.hidden.shape == (2, 2 * T, 32)
    assert set(out.aux) >= {"gate_output", "gate_input", "gate_forget", "usage_entropy", "state_norm"}
    assert {leaf.shape for leaf in out.aux.values()} == {(2,)}
    assert shapes("none_tiny", method="forward").aux == {}


@pytest.mark.parametrize(
    ("layers", "runs"),
    [
        (None, [LayerGroup(0, 4)]),
        ((0,), [LayerGroup(0, 1), LayerGroup(1, 3)]),
        ((1, 2), [LayerGroup(0, 1), LayerGroup(1, 2), LayerGroup(3, 1)]),
        ((0, 2), [LayerGroup(0, 1), LayerGroup(1, 1), LayerGroup(2, 1), LayerGroup(3, 1)]),
    ],
)
def test_equal_blocks_run_together(layers, runs):
    config = ModelConfig(decoder=DecoderConfig(num_layers=4), join=ResidualJoin(layers=layers))
    assert layer_groups(config) == runs
    params = abstract_params(lm2_jax.build_model(config))
    assert {name for name in params if name.startswith("blocks_")} == {f"blocks_{run.first}" for run in runs}
    with_memory = [run for run in runs if run.first in config.join.memory_layers(4)]
    assert {name for name in params if "memory" in params[name]} == {f"blocks_{run.first}" for run in with_memory}


def test_the_state_is_as_large_as_the_memory():
    config = lm2_jax.preset("lm2_tiny").model
    state = lm2_jax.build_model(config).init_state(3)
    assert lm2_jax.state.state_floats(state) == 2 * 3 * 6 * 32
    threaded = dataclasses.replace(config, join=ResidualJoin(topology="threaded"))
    assert lm2_jax.state.state_floats(lm2_jax.build_model(threaded).init_state(3)) == 3 * 6 * 32
    windowed = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, window_tokens=5))
    window = 2 * 3 * 4 * 2 * 8 * 2  # layers, rows, keys, groups, head width, keys and values
    assert lm2_jax.state.state_floats(lm2_jax.build_model(windowed).init_state(3)) == 2 * 3 * 6 * 32 + window


@pytest.mark.parametrize("name", sorted(lm2_jax.PRESETS))
def test_every_preset_has_the_shapes_it_says(name):
    """Initialises and runs as shapes, whatever its size."""
    config = lm2_jax.preset(name).model
    model = lm2_jax.build_model(config)
    state = jax.eval_shape(lambda: model.init_state(2))
    tokens = jax.ShapeDtypeStruct((2, 2 * config.segment_tokens), np.int32)
    logits, after = jax.eval_shape(
        lambda p, t, s: model.apply({"params": p}, t, s), abstract_params(model), tokens, state
    )
    assert logits.shape == (*tokens.shape, config.vocab_size)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
