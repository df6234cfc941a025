import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lm2_jax
from lm2_jax.attention import ExtraKV
from lm2_jax.memory.bank_reads import attend_slots, slot_weights
from lm2_jax.memory.bank_writes import ContentWrite, PaperWrite, SlotsWrite, gated_update
from lm2_jax.memory.gated_bank import GatedBankConfig, identity_rows
from lm2_jax.precision import Precision
from lm2_jax.state import begin_rows
from tests.contract.subjects import UNOPTIMIZED


@pytest.mark.parametrize(("slots", "width"), [(3, 8), (8, 8), (29, 8)])
def test_rows_of_the_start_are_distinct_unit_vectors(slots, width):
    rows = identity_rows(slots, width)
    assert rows.shape == (slots, width)
    np.testing.assert_array_equal(rows[: min(slots, width)], np.eye(slots, width)[: min(slots, width)])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1)
    for a, b in itertools.combinations(rows, 2):
        assert np.linalg.norm(a - b) > 0.1
    np.testing.assert_array_equal(rows, identity_rows(slots, width))


@pytest.mark.parametrize(
    "write", [SlotsWrite(), SlotsWrite(positions=False, gated=False), PaperWrite(), ContentWrite()]
)
@pytest.mark.parametrize("slots", [6, 19])
def test_no_two_slots_are_equal_after_one_segment(slots, write):
    """At the parameters that training starts from, more slots than the width of 8 included."""
    memory = GatedBankConfig(num_slots=slots, num_heads=2, write=write).build(8, Precision())
    x = jax.random.normal(jax.random.key(1), (1, 7, 8))
    state, valid = memory.init_state(1), jnp.ones((1, 7), bool)

    def write(bank, x, state, valid):
        return bank.write(x, begin_rows(state, bank.start_state(), bank.state_axes()), valid)

    init = jax.jit(lambda *a: memory.init_with_output(*a, method=write), compiler_options=UNOPTIMIZED)
    state, _ = init(jax.random.key(0), x, state, valid)
    rows = np.asarray(state.slots[0])
    gaps = [np.linalg.norm(a - b) for a, b in itertools.combinations(rows, 2)]
    assert min(gaps) > 1e-2


def test_no_two_slots_are_equal_after_one_segment_of_the_default_write():
    """Through the decoder block, with more slots than the width."""
    config = lm2_jax.preset("lm2_tiny").model
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, num_slots=config.decoder.width + 8))
    model, tokens = lm2_jax.build_model(config), jnp.arange(config.segment_tokens)[None] % 7
    params = jax.jit(model.init)(jax.random.key(0), tokens, model.init_state(1))
    _, state = jax.jit(model.apply)(params, tokens, model.init_state(1))
    for slots_ND in state.groups[0].memory.slots[:, 0]:
        distances = np.linalg.norm(slots_ND[:, None] - slots_ND[None], axis=-1)
        assert distances[~np.eye(len(slots_ND), dtype=bool)].min() > 1e-2


def test_gated_update_by_hand():
    """sigmoid(0) * tanh(1) + sigmoid(log 3) * 2, and closed gates keep what there was."""
    old, new = jnp.full((1, 1, 1), 2.0), jnp.full((1, 1, 1), 1.0)
    mixed = gated_update(old, new, jnp.zeros((1, 1, 1)), jnp.full((1, 1, 1), np.log(3.0)))
    np.testing.assert_allclose(mixed, [[[0.5 * np.tanh(1) + 0.75 * 2]]], rtol=1e-6)
    kept = gated_update(old, new, jnp.full((1, 1, 1), -100.0), jnp.full((1, 1, 1), 100.0))
    np.testing.assert_array_equal(kept, old)


def test_gated_update_is_bounded():
    rng = np.random.default_rng(0)
    old, new, gate_in, gate_forget = (jnp.asarray(100 * rng.standard_normal((2, 5, 3)), jnp.float32) for _ in range(4))
    after = gated_update(old, new, gate_in, gate_forget)
    assert (jnp.abs(after) <= jnp.abs(old) + 1).all()


def test_gates_are_float32_in_a_bfloat16_model():
    narrow = jnp.full((1, 1, 2), 0.5, jnp.bfloat16)
    metrics = {}
    assert gated_update(narrow, narrow, narrow, narrow, metrics).dtype == jnp.float32
    assert metrics["gate_input"] == pytest.approx(1 / (1 + np.exp(-0.5)))


def test_slot_weights_by_hand():
    """Scores 0, log 2 and log 5 give 1/8, 2/8 and 5/8; the two best alone 2/7 and 5/7."""
    q = jnp.full((1, 1, 1, 4), 1.0)
    k = jnp.asarray(np.log([1.0, 2.0, 5.0]) / 2, jnp.float32)[None, :, None, None] * jnp.ones((1, 3, 1, 4))
    np.testing.assert_allclose(slot_weights(q, k, None), [[[[1 / 8, 2 / 8, 5 / 8]]]], rtol=1e-6)
    np.testing.assert_allclose(slot_weights(q, k, 2), [[[[0, 2 / 7, 5 / 7]]]], rtol=1e-6)
    np.testing.assert_allclose(slot_weights(q, k, 1), [[[[0, 0, 1]]]])


def test_top_k_leaves_k_slots_and_a_sum_of_one():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 5, 4, 3), (2, 9, 2, 3)))
    weights = slot_weights(q, k, 3)
    assert weights.shape == (2, 5, 4, 9)
    assert ((weights > 0).sum(-1) == 3).all()
    np.testing.assert_allclose(weights.sum(-1), np.ones((2, 5, 4)), rtol=1e-6)
    all_of_them = slot_weights(q, k, None)
    np.testing.assert_array_equal(np.argmax(weights, -1), np.argmax(all_of_them, -1))


def test_query_heads_share_the_slots_of_their_group():
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((1, 5, 4, 3), (1, 6, 2, 3), (1, 6, 2, 3))
    )
    found = attend_slots(q, ExtraKV(k, v))
    for head in (1, 2):
        group = head // 2
        alone = attend_slots(q[:, :, head : head + 1], ExtraKV(k[:, :, group : group + 1], v[:, :, group : group + 1]))
        np.testing.assert_allclose(found[:, :, head], alone[:, :, 0], rtol=1e-5, atol=1e-6)


def test_usage_entropy_is_one_where_all_slots_are_used_alike():
    metrics = {}
    same = jnp.ones((1, 6, 2, 3))
    attend_slots(jnp.ones((1, 5, 4, 3)), ExtraKV(same, same), metrics=metrics)
    assert metrics["usage_entropy"] == pytest.approx(1, abs=1e-5)


def test_a_learned_start_begins_as_the_identity():
    memory = GatedBankConfig(num_slots=3, num_heads=2, start="learned").build(4, Precision())
    params = nn.unbox(memory.init(jax.random.key(0), method="start_state"))
    np.testing.assert_array_equal(params["params"]["start"], np.eye(3, 4))
    np.testing.assert_array_equal(memory.apply(params, method="start_state").slots, np.eye(3, 4)[None])


def test_a_row_that_begins_a_document_holds_the_start_whatever_its_slots_are():
    memory = GatedBankConfig(num_slots=3, num_heads=2).build(4, Precision())
    state = memory.init_state(2)
    used = state._replace(slots=jnp.full((2, 3, 4), 7.0), is_start=jnp.array([True, False]))
    begun = begin_rows(used, memory.apply({"params": {}}, method="start_state"), memory.state_axes())
    np.testing.assert_array_equal(begun.slots, [np.eye(3, 4), np.full((3, 4), 7.0)])


def test_positions_need_an_even_head_width():
    with pytest.raises(ValueError, match="even head width, got 3"):
        GatedBankConfig(num_slots=3, num_heads=2, write=SlotsWrite()).build(6, Precision())
    GatedBankConfig(num_slots=3, num_heads=2, write=SlotsWrite(positions=False)).build(6, Precision())
