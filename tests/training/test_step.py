"""One step: the loss by hand, and micro-batches that add up to the big batch."""

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
from lm2_jax.training.objective import loss_weights, means, tally
from lm2_jax.training.state import make_plan
from lm2_jax.training.step import cut, join, make_train_step

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


def test_weights_and_tally_by_hand():
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
    assert means(tally(batch, weight_BS, loss_BS, predicted_BS)) == pytest.approx(
        {
            "loss": (2 * 1 + 2 * 3 + 0.5 * 8) / 4.5,
            "answer_loss": 2.0,
            "text_loss": 8.0,
            "answer_accuracy": 1.0,  # the second is what ends the first
            "accuracy_d2": 1.0,
        }
    )


@pytest.mark.parametrize(("name", "carry"), [("lm2_tiny", True), ("rmt_tiny", False)])
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
def test_join_undoes_cut(axis):
    x = np.arange(2 * 12 * 5).reshape(2, 12, 5) if axis else np.arange(12 * 5).reshape(12, 5)
    pieces = cut(jnp.asarray(x), axis, 3)
    assert pieces.shape[0] == 3
    second = np.take(np.asarray(pieces[1]), 0, axis)
    np.testing.assert_array_equal(second, np.take(x, 1, axis), "row r goes to piece r % parts")
    np.testing.assert_array_equal(join(pieces, axis), x)
