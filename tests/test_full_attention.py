"""Full attention: one causal attention over a document, whatever its segments; an error where it is too long."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm2_jax
from lm2_jax.config import ModelConfig, RunConfig
from lm2_jax.errors import TooLongError
from lm2_jax.length import check_segments
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.model import LanguageModel
from tests.contract.subjects import FLOAT64, UNOPTIMIZED, assert_close, config_of, generic_params, precise

ROWS, LENGTH = 2, 24


def model_of(segment_tokens: int, max_tokens: int | None = LENGTH, **changes) -> LanguageModel:
    config = config_of("llama_tiny")
    decoder = dataclasses.replace(config.decoder, max_tokens=max_tokens, width=8, mlp_width=8, num_heads=2)
    changes = {"vocab_size": 32, "precision": FLOAT64, **changes}
    return lm2_jax.build_model(dataclasses.replace(config, decoder=decoder, segment_tokens=segment_tokens, **changes))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (ROWS, LENGTH), np.int32))


def result(model, bptt_segments=None, max_tokens=LENGTH):
    """Logits, and the gradient of a weighted sum of them."""
    weight = np.random.default_rng(1).standard_normal((ROWS, LENGTH, 32))

    def loss(params):
        out = model.apply(
            {"params": params},
            TOKENS,
            model.init_state(ROWS),
            method="forward",
            bptt_segments=bptt_segments,
            with_logits=True,
        )
        return jnp.sum(out.logits * weight), out.logits

    with precise(model.config):
        return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=UNOPTIMIZED)(generic_params(model))


@pytest.mark.parametrize("segment_tokens", [pytest.param(4, marks=pytest.mark.slow), 12])
def test_segments_bound_nothing(segment_tokens):
    """Logits and gradients are those of one segment of the full length, with and without a cache."""
    (_, logits), grads = result(model_of(segment_tokens))
    for whole in (model_of(LENGTH), model_of(LENGTH, None)):
        (_, expected), expected_grads = result(whole)
        np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-9)
        assert_close(grads, expected_grads, 1e-9)


@pytest.mark.slow
def test_truncated_backpropagation_truncates():
    """The forward pass is the same; the gradient is that of a model that takes earlier keys as constants."""
    (_, logits), grads = result(model_of(4), bptt_segments=2)
    (_, expected), _ = result(model_of(4))
    np.testing.assert_allclose(logits, expected, rtol=1e-12, atol=1e-12)
    model = model_of(4)
    weight = np.random.default_rng(1).standard_normal((ROWS, LENGTH, 32))

    def loss(params):
        state, total = model.init_state(ROWS), 0.0
        for first in range(0, LENGTH, 8):
            logits, state = model.apply({"params": params}, TOKENS[:, first : first + 8], state)
            total += jnp.sum(logits * weight[:, first : first + 8])
            state = jax.lax.stop_gradient(state)
        return total

    with precise(model.config):
        by_hand = jax.jit(jax.grad(loss), compiler_options=UNOPTIMIZED)(generic_params(model))
    assert_close(grads, by_hand, 1e-9)


def test_a_document_that_is_too_long_is_refused_before_it_is_computed():
    model = model_of(4, 22, precision=config_of("llama_tiny").precision)
    params, state = generic_params(model), model.init_state(ROWS)
    message = r"row 0 would have 24 tokens in one document.* model\.decoder\.max_tokens=22"
    for call in (
        lambda: model.apply({"params": params}, TOKENS, state),
        lambda: jax.eval_shape(lambda p: model.apply({"params": p}, TOKENS, model.init_state(ROWS)), params),
        lambda: lm2_jax.stream(model, params, TOKENS, state),
        lambda: lm2_jax.absorb(model, params, TOKENS, state),
    ):
        with pytest.raises(TooLongError, match=message):
            call()
    _, carry = lm2_jax.stream(model, params, TOKENS[:, :21], state)
    logits, carry = lm2_jax.stream(model, params, TOKENS[:, 21:22], carry)
    assert np.isfinite(logits).all()
    with pytest.raises(TooLongError, match="would have 23 tokens"):
        lm2_jax.stream(model, params, TOKENS[:, 22:23], carry)
    only_row_1 = np.array([[False], [True]])
    with pytest.raises(TooLongError, match="row 1 would have 23"):
        lm2_jax.stream(model, params, TOKENS[:, 22:23], carry, only_row_1)


def test_a_reset_makes_room():
    model = model_of(4, 22)
    reset = np.zeros((ROWS, 6), bool)
    reset[:, 3] = True
    with precise(model.config):
        params = generic_params(model)
        apply = jax.jit(lambda t, s, r: model.apply({"params": params}, t, s, r), compiler_options=UNOPTIMIZED)
        logits, state = apply(TOKENS, model.init_state(ROWS), jnp.asarray(reset))
        fresh, _ = apply(TOKENS[:, 12:], model.init_state(ROWS), jnp.zeros(ROWS, bool))
        check_segments(model.config, state, (ROWS, 12), np.ones(ROWS, bool))
        with pytest.raises(TooLongError):
            check_segments(model.config, state, (ROWS, 12))
    np.testing.assert_allclose(logits[:, 12:], fresh, rtol=1e-12, atol=1e-12)


def test_inside_a_program_what_does_not_fit_is_nan():
    """Where nothing can be raised: only the positions beyond the limit, only in the rows that are too long."""
    model, reset = model_of(4, 22), np.zeros((ROWS, 6), bool)
    reset[1, 1] = True
    with precise(model.config):
        params = generic_params(model)
        apply = jax.jit(lambda p, s, r: model.apply({"params": p}, TOKENS, s, r), compiler_options=UNOPTIMIZED)
        logits, state = apply(params, model.init_state(ROWS), jnp.asarray(reset))
    assert np.isfinite(logits[0, :22]).all()
    assert np.isnan(logits[0, 22:]).all()
    assert np.isfinite(logits[1]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: dataclasses.replace(c.decoder, window_tokens=8), "exclude each other"),
        (lambda c: dataclasses.replace(c, memory=GatedBankConfig(), join=lm2_jax.preset("lm2_tiny").model.join),
         r"join 'residual' takes no full attention.*\['gate', 'layer', 'mixer', 'plain'\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change(config_of("llama_tiny"))


def test_rows_longer_than_the_cache_are_refused_when_the_run_is_made():
    run: RunConfig = lm2_jax.preset("llama_tiny")
    decoder = dataclasses.replace(run.model.decoder, max_tokens=63)
    model: ModelConfig = dataclasses.replace(run.model, decoder=decoder)
    with pytest.raises(ValueError, match=r"up to 64 tokens.*max_tokens=63"):
        dataclasses.replace(run, model=model)
