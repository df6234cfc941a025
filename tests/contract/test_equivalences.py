"""What must not change a result: the order of the loops, rematerialisation, jit, devices, number types."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from lm2_jax.precision import Precision
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from tests.contract.subjects import (
    FLOAT64,
    ROWS,
    SEGMENTS,
    TINY,
    Subject,
    assert_close,
    assert_equal,
    changed,
    config_of,
    precise,
    subject,
)

slow = pytest.mark.slow


def eventful(case: Subject):
    """A run from a used state with a reset in the middle, padding, an empty segment, and gradients of everything."""
    T, rng = case.T, np.random.default_rng(7)
    reset, valid = np.zeros((ROWS, SEGMENTS), bool), np.ones((ROWS, case.S), bool)
    reset[0, 1] = reset[1, 2] = True
    valid[0, T - 4 : T], valid[1, T + 5 : 2 * T], valid[2, T : 2 * T] = False, False, False
    used = case.run(np.roll(case.tokens, 5, axis=1)).state
    weight = rng.standard_normal((ROWS, case.S, case.config.vocab_size))
    hidden_weight = weight[:, :, : case.config.decoder.width]
    result = case.run(None, used, reset, valid, hidden_weight, weight, 0.1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    mask = valid[:, :, None]
    return result._replace(logits=np.where(mask, result.logits, 0), hidden=np.where(mask, result.hidden, 0))


@pytest.mark.parametrize(
    "name",
    [
        "middle_layer_learned_window",
        "window_scaled_rope_untied",
        pytest.param("block_write_window", marks=slow),
        pytest.param("more_slots_than_width", marks=slow),
        pytest.param("context_window", marks=slow),
        pytest.param("mixed_with_plain", marks=slow),
        pytest.param("full_gate", marks=slow),
    ],
)
def test_both_schedules_agree(name):
    """Layers outside or segments outside: the same logits, state and gradients, with windows, resets and padding."""
    layers, segments = eventful(subject(name)), eventful(changed(name, schedule="segment_major"))
    assert subject(name).config.schedule == "auto"
    assert_close(segments, layers, 1e-9)


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("middle_layer_learned_window", "dots"),
        pytest.param("middle_layer_learned_window", "full", marks=slow),
        pytest.param("rmt_tiny", "full", marks=slow),
        pytest.param("hmt_tiny", "dots", marks=slow),
        pytest.param("threaded_outer_layers_window", "full", marks=slow),
        pytest.param("paper_shared", "dots", marks=slow),
        pytest.param("context_window", "dots", marks=slow),
        pytest.param("mixed_with_plain", "full", marks=slow),
    ],
)
def test_rematerialisation_changes_no_gradient(name, remat):
    case = subject(name)
    assert case.config.remat == "none"
    assert_close(eventful(changed(name, remat=remat)), eventful(case), 1e-9 if case.float64 else 1e-4)


def segment_reach(case: Subject) -> np.ndarray:
    """[s, r]: whether the gradient of a loss in segment s reaches tokens of segment r."""
    table = []
    for s in range(SEGMENTS):
        where = np.zeros((ROWS, SEGMENTS, case.T), bool)
        where[:, s] = True
        reach = case.reach(case.run(hidden_weight=case.hidden_weight(where.reshape(ROWS, case.S))))
        table.append(reach.reshape(ROWS, SEGMENTS, case.T).max(axis=(0, 2)) > 0)
    return np.array(table)


@pytest.mark.parametrize(
    ("name", "bptt_segments"),
    [
        ("middle_layer_learned_window", 2),
        ("rmt_tiny", 1),
        pytest.param("hmt_tiny", 1, marks=slow),
        pytest.param("hmt_tiny", 2, marks=slow),
        ("window_scaled_rope_untied", 2),
        pytest.param("middle_layer_learned_window", 1, marks=slow),
        pytest.param("llama_tiny", 1, marks=slow),
        ("llama_tiny", 2),
        pytest.param("full_gate", 2, marks=slow),
        pytest.param("threaded_outer_layers_window", 1, marks=slow),
        pytest.param("threaded_outer_layers_window", 2, marks=slow),
        pytest.param("rmt_tiny", 2, marks=slow),
        pytest.param("lm2_tiny", 2, marks=slow),
        pytest.param("block_write_window", 2, marks=slow),
        pytest.param("paper_shared", 2, marks=slow),
        pytest.param("context_window", 2, marks=slow),
        pytest.param("titans_mal_tiny", 1, marks=slow),
    ],
)
def test_gradient_reaches_its_block_of_segments_and_no_further(name, bptt_segments):
    s, r = np.indices((SEGMENTS, SEGMENTS))
    reached = segment_reach(changed(name, bptt_segments))
    np.testing.assert_array_equal(reached, (r <= s) & (r // bptt_segments == s // bptt_segments))
    assert_close(changed(name, bptt_segments).run().logits, subject(name).run().logits, subject(name).tolerance)


@pytest.mark.parametrize("name", [*TINY, "window_scaled_rope_untied", "threaded_outer_layers_window"])
def test_gradient_reaches_all_segments_by_default(name):
    case = subject(name)
    s, r = np.indices((SEGMENTS, SEGMENTS))
    np.testing.assert_array_equal(segment_reach(case), (r <= s) if case.remembers else (r == s))


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "rmt_tiny" else slow) for name in TINY])
def test_without_jit_the_same(name):
    decoder = config_of(name).decoder
    if decoder.window_tokens is not None:
        decoder = dataclasses.replace(decoder, window_tokens=3)
    case = changed(name, segment_tokens=4, decoder=decoder, precision=FLOAT64)
    logits, state = case.apply(case.tokens)
    with jax.disable_jit(), precise(case.config):
        plain, after = case.model.apply({"params": case.params}, jnp.asarray(case.tokens), case.start())
    assert_close((plain, after), (logits, state), 1e-9)


# An associative memory has products of two projections of a token as features.
LARGE = {"associative": 4}


@pytest.mark.parametrize("name", TINY)
def test_a_hundred_segments_stay_finite(name):
    """The state keeps its types; a gated slot grows by 1 a segment at most, and what is normalised does not grow."""
    case = subject(name)
    rng, state = np.random.default_rng(8), case.start()
    types = [leaf.dtype for leaf in jax.tree.leaves(state)]
    for segment in range(1, 101):
        tokens = rng.integers(0, case.config.vocab_size, (ROWS, case.T), np.int32)
        logits, state = case.apply(tokens, state)
        assert np.isfinite(logits).all()
        most = max(segment + 1, 8) * LARGE.get(case.config.memory.kind, 1)
        assert all(float(jnp.abs(leaf).max()) <= most for leaf in jax.tree.leaves(state))
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == types


# ARMT answers with the quotient of two sums, both rounded to bfloat16 after each segment.
ROUNDED = {"associative": 0.1}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("lm2_tiny", "rmt_tiny") else slow) for name in TINY]
)
def test_bfloat16_is_close(name):
    case, narrow = subject(name), changed(name, precision=Precision(compute="bfloat16", state="bfloat16"))
    exact, _ = case.apply(case.tokens)
    logits, state = narrow.apply(case.tokens)
    assert logits.dtype == jnp.float32
    types = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert types == {leaf.dtype for leaf in jax.tree.leaves(narrow.start())}
    assert np.dtype(jnp.bfloat16) in types or not case.remembers
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert error < ROUNDED.get(case.config.memory.kind, 0.05), error


@pytest.mark.parametrize("name", TINY)
def test_a_state_is_restored_onto_other_devices(name, tmp_path):
    """Saved with rows split over four devices, restored over two; the tree keeps its types, bfloat16 too."""
    if not subject(name).remembers:
        pytest.skip("nothing crosses a segment border")
    case, rng = changed(name, precision=Precision(state="bfloat16")), np.random.default_rng(9)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.integers(0, 2, leaf.shape), leaf.dtype), case.start(4))
    four, two = (
        Layout(make_mesh(config, jax.devices()[:devices])).shardings(case.axes, state)
        for config, devices in ((MeshConfig(data=2, fsdp=2), 4), (MeshConfig(data=2), 2))
    )
    shapes = jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), state, two)
    ocp.save(tmp_path / "state", jax.device_put(state, four))
    restored = ocp.load(tmp_path / "state", shapes)
    assert_equal(restored, state)
    for leaf, where in zip(jax.tree.leaves(restored), jax.tree.leaves(two), strict=True):
        assert leaf.sharding == where
        assert leaf.sharding.shard_shape(leaf.shape) != leaf.shape
