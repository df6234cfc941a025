"""Rotary frequencies and their scalings; parity with `transformers` is in tests/interop/test_parity.py."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import lm2_jax
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.config import ModelConfig, RunConfig, from_dict, to_dict
from lm2_jax.decoder import DecoderConfig
from lm2_jax.memory.bank_writes import BlockWrite
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.memory.none import NoMemory
from lm2_jax.model import LanguageModel
from lm2_jax.rope import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling, rope_frequencies
from tests.contract.subjects import generic_params


def test_linear_and_dynamic_frequencies():
    plain = rope_frequencies(8, 10_000.0, None)
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001])
    np.testing.assert_allclose(rope_frequencies(8, 10_000.0, LinearScaling(factor=4.0)), plain / 4)
    np.testing.assert_array_equal(rope_frequencies(8, 10_000.0, DynamicScaling(factor=4.0)), plain)


def test_yarn_frequencies_by_the_turns_of_a_pair():
    """Pairs of more than beta_fast turns are kept, those of fewer than beta_slow divided; between them in a ramp."""
    scaling = YarnScaling(factor=8.0, original_tokens=4096, beta_fast=32.0, beta_slow=1.0, truncate=False)
    plain, scaled = (rope_frequencies(128, 10_000.0, s) for s in (None, scaling))
    turns = 4096 * plain / (2 * np.pi)
    fast, slow = turns > 32, turns < 1
    np.testing.assert_array_equal(scaled[fast], plain[fast])
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8)
    assert min(fast.sum(), slow.sum()) > 10
    # Between the two, the share that is divided grows linearly in the logarithm of the turns.
    share = (plain / scaled - 1)[~fast & ~slow] * scaled[~fast & ~slow] / plain[~fast & ~slow] * 8 / 7
    expected = np.log(32 / turns[~fast & ~slow]) / np.log(32)
    np.testing.assert_allclose(share, expected, rtol=1e-9)
    # Rounded outwards to pairs, the ramp is the wider.
    rounded = rope_frequencies(128, 10_000.0, dataclasses.replace(scaling, truncate=True))
    assert (rounded != scaled).any()
    assert (rounded[0], rounded[-1]) == (plain[0], pytest.approx(plain[-1] / 8))


def test_yarn_multiplies_scores():
    assert YarnScaling(factor=4.0).score_factor == pytest.approx((0.1 * math.log(4) + 1) ** 2)
    assert YarnScaling(factor=1.0).score_factor == 1
    assert YarnScaling(attention_factor=1.5).score_factor == 2.25
    assert Llama3Scaling().score_factor == LinearScaling().score_factor == 1


MODELS = {
    "window_and_persistent": (NoMemory(), PlainJoin(num_persistent=2), {"window_tokens": 5}),
    "full": (NoMemory(), PlainJoin(), {"max_tokens": 24}),
    "block_write": (GatedBankConfig(num_slots=3, num_heads=2, write=BlockWrite()), ResidualJoin(read="own"), {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_factor_of_the_scores_is_the_same_as_larger_queries(name):
    """Also where keys are rotated back for the next segment, not rotated, or asked for from the segment's end."""
    memory, join, fields = MODELS[name]
    decoder = DecoderConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=24, **fields)
    plain = ModelConfig(vocab_size=61, segment_tokens=8, decoder=decoder, memory=memory, join=join)
    yarn = dataclasses.replace(decoder, rope_scaling=YarnScaling(factor=1.0, attention_factor=1.25))
    scaled = LanguageModel(dataclasses.replace(plain, decoder=yarn))
    tokens = np.random.default_rng(0).integers(0, 61, (2, 24)).astype(np.int32)
    params = generic_params(LanguageModel(plain))
    larger = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (1.25**2 if "q_proj" in str(path) else 1.0), params
    )
    other, _ = jax.jit(LanguageModel(plain).apply)({"params": params}, tokens, scaled.init_state(2))
    expected, _ = jax.jit(LanguageModel(plain).apply)({"params": larger}, tokens, scaled.init_state(2))
    found, _ = jax.jit(scaled.apply)({"params": params}, tokens, scaled.init_state(2))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - other).max() > 1e-3
    state, pieces = scaled.init_state(2), []
    for piece in np.split(tokens, [3, 17], axis=1):
        logits, state = lm2_jax.stream(scaled, params, piece, state)
        pieces.append(np.asarray(logits))
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=1e-5)


def test_a_config_of_an_older_format_has_llama_3s_scaling():
    plain = to_dict(RunConfig())
    plain["format"], decoder = 3, plain["model"]["decoder"]
    decoder["rope_scaling"] = to_dict(Llama3Scaling(factor=4.0))
    for table, field in ((decoder["rope_scaling"], "kind"), (decoder, "attention_bias"), (decoder, "qk_norm")):
        del table[field]
    found = from_dict(RunConfig, plain).model.decoder
    assert (found.rope_scaling, found.attention_bias, found.qk_norm) == (Llama3Scaling(factor=4.0), "none", False)


def test_every_scaling_survives_its_dictionary():
    for scaling in (LinearScaling(), DynamicScaling(), Llama3Scaling(), YarnScaling(attention_factor=1.5)):
        decoder = DecoderConfig(rope_scaling=scaling, attention_bias="qkv", qk_norm=True)
        assert from_dict(DecoderConfig, to_dict(decoder)) == decoder
