import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm2_jax
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.config import ModelConfig
from lm2_jax.decoder import DecoderConfig
from lm2_jax.loss import token_losses, token_terms
from lm2_jax.memory.none import NoMemory
from tests.contract.subjects import generic_params

VOCAB, B, S, D = 11, 2, 7, 6


def model(tie_head: bool = True):
    decoder = DecoderConfig(width=D, num_layers=1, num_heads=1, num_kv_heads=1, mlp_width=4, tie_head=tie_head)
    return lm2_jax.build_model(ModelConfig(VOCAB, S, decoder, NoMemory(), PlainJoin()))


def inputs():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((B, S, D)), jnp.float32)
    return hidden, jnp.asarray(rng.integers(0, VOCAB, (B, S)), jnp.int32)


@pytest.mark.parametrize("tie_head", [True, False])
def test_loss_and_best_token_by_the_definition(tie_head):
    m, (hidden, targets) = model(tie_head), inputs()
    params = generic_params(m)
    w = np.asarray(params["embed"]["table"]).T if tie_head else np.asarray(params["head"]["w"])
    logits = np.asarray(hidden, np.float64) @ w
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses, best = token_losses(m, params, hidden, targets, time_chunk=100)
    np.testing.assert_allclose(
        losses, -np.take_along_axis(log_p, np.asarray(targets)[:, :, None], 2)[:, :, 0], rtol=1e-5
    )
    np.testing.assert_array_equal(best, logits.argmax(-1))
    normalizer = token_terms(m, params, hidden, targets, time_chunk=3).log_normalizer_BS
    np.testing.assert_allclose(normalizer, np.log(np.exp(logits).sum(-1)), rtol=1e-5)


@pytest.mark.parametrize("time_chunk", [1, 2, 3, 4, 6, 7])
def test_chunks_of_any_length_change_nothing(time_chunk):
    """Values and gradients; 7 positions are no multiple of most of these."""
    m, (hidden, targets) = model(), inputs()
    params, weight = generic_params(m), jnp.asarray(np.random.default_rng(1).random((B, S)), jnp.float32)

    def total(params, hidden, chunk):
        losses, best = token_losses(m, params, hidden, targets, chunk)
        return jnp.sum(losses * weight), (losses, best)

    def both(chunk):
        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True), static_argnums=2)(params, hidden, chunk)

    (grads, (losses, best)), (expected, (whole, best_of_whole)) = both(time_chunk), both(S)
    assert losses.shape == best.shape == (B, S)
    np.testing.assert_allclose(losses, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(best, best_of_whole)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_no_array_of_all_logits_exists_in_chunks():
    """The program of two positions a chunk has no array of the size of all logits."""
    m, (hidden, targets) = model(), inputs()
    params = generic_params(m)
    text = jax.jit(lambda p, h: token_losses(m, p, h, targets, 2)[0].sum()).lower(params, hidden).as_text()
    assert f"{B}x2x{VOCAB}xf32" in text
    assert f"{B}x{S}x{VOCAB}xf32" not in text
    assert f"{B}x8x{VOCAB}xf32" not in text
