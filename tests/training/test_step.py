"""One step: the loss by hand, micro-batches, frozen parameters, z-loss, moving averages and bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm2_jax
from lm2_jax.config import LossConfig
from lm2_jax.data.base import Example
from lm2_jax.data.text_source import TextFiles
from lm2_jax.model import LanguageModel
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.training.flops import traced_flops
from lm2_jax.training.objective import loss_weights, means, metric_sums, objective
from lm2_jax.training.state import evaluation_params, make_plan
from lm2_jax.training.step import make_train_step, merge_rows, split_rows
from tests.contract.subjects import UNOPTIMIZED

ROWS, SEGMENTS = 8, 4


def batch_of(config, seed=0, segments=SEGMENTS):
    """Random rows whose loss weights differ widely, padding at the end of some."""
    draw = np.random.default_rng(seed)
    shape = (ROWS, segments * config.model.segment_tokens)
    tokens, targets = draw.integers(0, config.model.vocab_size, (2, *shape), np.int32)
    answer = draw.random(shape) < np.linspace(0.02, 0.5, ROWS)[:, None]
    valid = np.arange(shape[1])[None] < draw.integers(shape[1] // 2, shape[1] + 1, ROWS)[:, None]
    distance = np.where(answer, draw.integers(0, 12, shape), -1).astype(np.int32)
    reset = draw.random((ROWS, segments)) < 0.3
    return Example(tokens, targets, answer, ~answer, valid, reset, distance, np.zeros(shape, np.int32))


def config_with(carry=True, bptt=None, **optim):
    base = lm2_jax.preset("lm2_tiny")
    source = TextFiles(path="never read", packing="ordered")
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, source=source, rows=ROWS, carry_state=carry),
        loss=LossConfig(answer_weight=1.0, text_weight=0.3),
        optim=dataclasses.replace(base.optim, warmup_steps=0, **optim),
        train=dataclasses.replace(base.train, bptt_segments=bptt),
    )


def one_step(config, layout=None, segments=SEGMENTS):
    layout = layout or Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    plan = make_plan(config, LanguageModel(config.model))
    step = jax.jit(make_train_step(plan))
    with layout.context():
        state = plan.init(layout)
        return step(state, layout.batch(batch_of(config, segments=segments)))


def test_weights_and_metric_sums_by_hand():
    config = dataclasses.replace(config_with(), loss=LossConfig(answer_weight=2.0, text_weight=0.5))
    batch = Example(
        tokens=np.zeros((1, 5), np.int32),
        targets=np.array([[1, 2, 3, 4, 5]], np.int32),
        answer=np.array([[True, True, False, False, True]]),
        text=np.array([[False, False, True, True, False]]),
        valid=np.array([[True, True, True, False, False]]),
        reset=np.zeros((1, 1), bool),
        distance=np.array([[3, -1, -1, -1, 0]], np.int32),
        document=np.zeros((1, 5), np.int32),
    )
    weight_BS = loss_weights(batch, config)
    np.testing.assert_array_equal(weight_BS, [[2.0, 2.0, 0.5, 0.0, 0.0]])
    loss_BS, predicted_BS = jnp.array([[1.0, 3.0, 8.0, 100.0, 100.0]]), jnp.array([[1, 0, 3, 4, 5]], jnp.int32)
    assert means(metric_sums(batch, weight_BS, loss_BS, predicted_BS)) == pytest.approx(
        {
            "loss": (2 * 1 + 2 * 3 + 0.5 * 8) / 4.5,
            "answer_loss": 2.0,
            "text_loss": 8.0,
            "answer_accuracy": 1.0,  # the second is what ends the first
            "accuracy_d2": 1.0,
        }
    )


@pytest.mark.parametrize(
    ("name", "carry"), [("lm2_tiny", True), pytest.param("rmt_tiny", False, marks=pytest.mark.slow)]
)
def test_accumulated_micro_batches_equal_the_big_batch(name, carry):
    """Micro-batches of unequal weight: the mean of their means would be another gradient."""
    config = dataclasses.replace(config_with(carry), model=lm2_jax.preset(name).model)
    whole, report = one_step(config)
    split, split_report = one_step(dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate=4)))
    np.testing.assert_allclose(split_report.grad_norm, report.grad_norm, rtol=2e-5)
    for name_, value in report.tally.items():
        np.testing.assert_allclose(split_report.tally[name_], value, rtol=2e-5, err_msg=name_)
    mu, split_mu = whole.opt_state[1].mu, split.opt_state[1].mu  # the gradient, but for clipping and a factor
    for a, b in zip(jax.tree.leaves(mu), jax.tree.leaves(split_mu), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)
    for a, b in zip(jax.tree.leaves(whole.memory), jax.tree.leaves(split.memory), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_memory_goes_from_step_to_step():
    config = config_with()
    layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    plan = make_plan(config, LanguageModel(config.model))
    step = jax.jit(make_train_step(plan))
    quiet = batch_of(config)._replace(reset=np.zeros((ROWS, SEGMENTS), bool))
    reset = quiet._replace(reset=np.arange(SEGMENTS)[None] == np.zeros((ROWS, 1)))
    with layout.context():
        state = plan.init(layout)
        read, _ = step(state, layout.batch(quiet))
        forgetful = read._replace(memory=state.memory)
        losses = {
            (name, kind): float(step(before, layout.batch(batch))[1].tally["loss"][0])
            for name, before in (("read", read), ("forgetful", forgetful))
            for kind, batch in (("quiet", quiet), ("reset", reset))
        }
    assert losses["read", "quiet"] != losses["forgetful", "quiet"], "what was read before matters"
    assert losses["read", "reset"] == losses["forgetful", "reset"], "unless a document begins"


@pytest.mark.slow
def test_full_attention_keeps_the_keys_of_a_row_where_rows_begin_anew():
    """The step equals one with `max_tokens` of a row, costs as much, and a carried state keeps all of them."""
    config = dataclasses.replace(config_with(False), model=lm2_jax.preset("llama_tiny").model)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, segments=(2, SEGMENTS), stage_steps=(5,))
    )
    row = SEGMENTS * config.model.segment_tokens
    decoder = dataclasses.replace(config.model.decoder, max_tokens=row)
    short = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))
    (after, report), (expected, short_report) = one_step(config), one_step(short)
    assert np.isfinite(report.grad_norm)
    assert report.grad_norm == short_report.grad_norm
    jax.tree.map(np.testing.assert_array_equal, after.params, expected.params)
    long_plan, short_plan = (make_plan(c, LanguageModel(c.model)) for c in (config, short))
    assert step_flops(long_plan) == step_flops(short_plan)
    carried = make_plan(dataclasses.replace(config_with(), model=config.model), LanguageModel(config.model))
    assert carried.step_model == carried.model
    assert step_flops(carried) > 2 * step_flops(long_plan)


def step_flops(plan):
    state = jax.eval_shape(lambda: plan.first_state(plan.first_params()))
    return traced_flops(make_train_step(plan), state, batch_of(plan.config))


def test_bptt_blocks_change_the_gradient_and_not_the_loss():
    (_, full), (_, short) = one_step(config_with(carry=False)), one_step(config_with(carry=False, bptt=2))
    np.testing.assert_allclose(full.tally["loss"], short.tally["loss"], rtol=1e-6)
    assert abs(float(full.grad_norm) - float(short.grad_norm)) > 1e-6 * float(full.grad_norm)


@pytest.mark.slow  # virtual devices wait for each other, and there are more of them than cores
@pytest.mark.parity
def test_a_sharded_step_equals_the_one_on_one_device():
    config = config_with(accumulate=2)
    layout = Layout(make_mesh(MeshConfig(fsdp=2, model=2), jax.devices()[:4]))
    (single, report), (sharded, sharded_report) = one_step(config, segments=2), one_step(config, layout, segments=2)
    table = sharded.params["embed"]["table"]
    assert np.prod(table.sharding.shard_shape(table.shape)) < table.size
    np.testing.assert_allclose(sharded_report.grad_norm, report.grad_norm, rtol=2e-4)
    for a, b in zip(jax.tree.leaves(single.opt_state[1].mu), jax.tree.leaves(sharded.opt_state[1].mu), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
    for a, b in zip(jax.tree.leaves(single.memory), jax.tree.leaves(sharded.memory), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_merging_undoes_splitting(axis):
    x = np.arange(2 * 12 * 5).reshape(2, 12, 5) if axis else np.arange(12 * 5).reshape(12, 5)
    pieces = split_rows(jnp.asarray(x), axis, 3)
    assert pieces.shape[0] == 3
    second = np.take(np.asarray(pieces[1]), 0, axis)
    np.testing.assert_array_equal(second, np.take(x, 1, axis), "row r belongs to micro-batch r % count")
    np.testing.assert_array_equal(merge_rows(pieces, axis), x)


def plain(**optim):
    """A decoder without memory, of one block, for what does not concern a memory; it compiles quickly."""
    config, model = config_with(carry=False, **optim), lm2_jax.preset("none_tiny").model
    decoder = dataclasses.replace(model.decoder, num_layers=1)
    return dataclasses.replace(config, model=dataclasses.replace(model, decoder=decoder))


def steps(config, count, seed=0):
    """The train state after each of some steps, the initial one first."""
    layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    plan = make_plan(config, LanguageModel(config.model))
    step, found = jax.jit(make_train_step(plan), compiler_options=UNOPTIMIZED), []
    with layout.context():
        state = plan.init(layout)
        found.append(state)
        for number in range(count):
            state, _ = step(state, layout.batch(batch_of(config, seed + number, segments=1)))
            found.append(state)
    return found


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float32)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_frozen_parameters_stay_and_the_others_learn():
    states = steps(plain(freeze=("embed", "blocks_0/mlp")), 2)
    first, last = by_path(states[0].params), by_path(states[-1].params)
    frozen = {path for path in first if np.array_equal(first[path], last[path])}
    assert frozen == {path for path in first if path.startswith(("embed/", "blocks_0/mlp/"))}
    learning = [leaf for path, leaf in first.items() if path not in frozen]
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(states[0].opt_state))
    assert state_bytes == 2 * sum(leaf.nbytes for leaf in learning) + 8, "two moments of what learns, two counters"


def test_gradients_of_frozen_parameters_cost_nothing():
    """A frozen kernel saves the product for its gradient, a third of its products in a step."""

    def flops(**optim):
        config = plain(**optim)
        plan = make_plan(config, LanguageModel(config.model))
        return traced_flops(make_train_step(plan), plan.shapes, batch_of(config, segments=1))

    decoder, tokens = plain().model.decoder, ROWS * plain().model.segment_tokens
    kernels = 3 * decoder.width * decoder.mlp_width
    assert flops() - flops(freeze=("*/mlp",)) == 2 * tokens * kernels


@pytest.mark.slow
def test_the_z_loss_by_hand():
    config = plain()
    with_z = dataclasses.replace(config, loss=dataclasses.replace(config.loss, z_loss=0.5))
    (_, without), (_, report) = one_step(config), one_step(with_z)
    np.testing.assert_array_equal(without.tally["loss"], report.tally["loss"], "the reported loss stays cross-entropy")
    assert "z_loss" not in without.tally
    plan = make_plan(with_z, LanguageModel(with_z.model))
    layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    with layout.context():
        params, batch = plan.init(layout).params, layout.batch(batch_of(config))
        out = plan.model.apply(
            {"params": params},
            batch.tokens,
            plan.model.init_state(ROWS),
            batch.reset,
            batch.valid,
            method="forward",
            with_logits=True,
        )
    weight = np.asarray(loss_weights(batch, config))
    expected = (weight * np.square(jax.nn.logsumexp(out.logits, axis=-1))).sum()
    np.testing.assert_allclose(report.tally["z_loss"], [expected, weight.sum()], rtol=1e-4)
    sums = {name: jnp.asarray(value) for name, value in report.tally.items()}
    np.testing.assert_allclose(objective(sums, with_z.loss), sums["loss"][0] + 0.5 * expected, rtol=1e-4)
    assert float(report.grad_norm) != float(without.grad_norm), "it is minimised"


def test_the_moving_average_by_hand():
    states = steps(plain(ema_decay=0.5, freeze=("embed",)), 3)
    expected = by_path(states[0].params)
    for number, state in enumerate(states[1:]):
        decay = min(0.5, (1 + number) / (10 + number))
        expected = {path: decay * expected[path] + (1 - decay) * leaf for path, leaf in by_path(state.params).items()}
    found = by_path(evaluation_params(states[-1]))
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-5, atol=1e-7, err_msg=path)
    assert set(by_path(states[-1].averaged)) == {path for path in expected if not path.startswith("embed/")}
    assert any((found[path] != leaf).any() for path, leaf in by_path(states[-1].params).items())


def test_without_a_moving_average_the_parameters_are_evaluated():
    (state,) = steps(plain(), 0)
    assert state.averaged is None
    assert evaluation_params(state) is state.params


def unchanged(**precision):
    """Share of parameters whose value is the same after 30 steps at an ordinary learning rate."""
    config = plain(learning_rate=1e-4, steps=30)
    precision = dataclasses.replace(config.model.precision, **precision)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, precision=precision))
    states = steps(config, 30)
    first, last = by_path(states[0].params), by_path(states[-1].params)
    return sum((first[path] == last[path]).sum() for path in first) / sum(leaf.size for leaf in first.values())


@pytest.mark.slow
def test_bfloat16_parameters_learn_with_a_master_copy():
    """46% of the rounded parameters are unchanged with a float32 copy, 86% without; in float32, none is."""
    wide, kept, lost = unchanged(), unchanged(params="bfloat16"), unchanged(params="bfloat16", master_copy=False)
    assert wide < 0.01
    assert kept < 0.5
    assert lost > 0.8
