"""A memory added to a pretrained decoder: what its first logits are."""

import dataclasses

import jax
import numpy as np
import pytest

from lm2_jax.blocks import JOINS
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.config import RunConfig
from lm2_jax.errors import UserError
from lm2_jax.interop.graft import graft, silent
from lm2_jax.interop.load import load_params, source_reader
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.workdir import decoder_model
from lm2_jax.memory.base import MemoryConfig
from lm2_jax.model import LanguageModel
from lm2_jax.presets import PRESETS
from lm2_jax.presets.tiny import MEMORIES
from lm2_jax.training.state import make_plan
from tests.interop.folders import hf_folder

SILENT = {"none", "none_window", "lm2", "lm2_threaded", "lm2_paper", "titans_mag", "titans_mal", "titans_residual"}
# Mean Kullback-Leibler divergence in nats of the decoder's next-token distribution from that with the memory; see the
# table in docs/bring_your_own_model.md. A mixer has lost its attention, so nothing is promised for it.
LARGEST_DIVERGENCE = {"lm2_context": 1.0, "titans_mac": 1.0, "rmt": 1.0, "hybrid": 1.0}
REPLACES_ATTENTION = {"gated_delta", "titans_lmm"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(hf_folder(tmp_path_factory.mktemp("llama")))


def first_logits(source, model, zeros=()):
    plan = make_plan(dataclasses.replace(RunConfig(), model=model), LanguageModel(model))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(plan, jax.tree.map(lambda _: place, plan.shapes.params), source_reader(source), zeros)
    tokens = np.random.default_rng(5).integers(0, model.vocab_size, (2, 2 * model.segment_tokens), np.int32)
    logits = jax.jit(plan.model.apply)({"params": params}, tokens, plan.model.init_state(2))[0]
    return np.asarray(logits), params


@pytest.fixture(scope="module")
def decoder(source):
    """The decoder, and its logits in each of the two orders of computation, which round differently."""
    model = decoder_model(source, 32)
    orders = ("layer_major", "segment_major")
    return model, {order: first_logits(source, dataclasses.replace(model, schedule=order))[0] for order in orders}


def test_every_memory_and_join_is_here():
    listed = {**MEMORIES}
    kinds = {memory.kind for memory, _ in listed.values()}
    assert kinds == set(MemoryConfig.registry)
    assert {join.kind for _, join in listed.values()} == set(JOINS)
    assert SILENT | REPLACES_ATTENTION | LARGEST_DIVERGENCE.keys() == listed.keys()


@pytest.mark.parametrize("name", MEMORIES)
def test_the_first_logits(name, source, decoder):
    model, orders = decoder
    grafted = graft(model, *MEMORIES[name])
    has_stack = grafted.model.join.stack(grafted.model.block_spec, parent=None) is not None
    expected = orders["segment_major" if has_stack else "layer_major"]
    logits, params = first_logits(source, grafted.model, grafted.start.zeros)
    assert grafted.start.is_silent == (name in SILENT)
    assert np.isfinite(logits).all()
    if grafted.start.is_silent:
        np.testing.assert_array_equal(logits, expected)
    else:
        assert grafted.start.reason
    if name in LARGEST_DIVERGENCE:
        p, q = (np.asarray(jax.nn.log_softmax(x.astype(np.float64))) for x in (expected, logits))
        divergence = float((np.exp(p) * (p - q)).sum(-1).mean())
        print(name, divergence)
        assert 0 < divergence < LARGEST_DIVERGENCE[name]
    # The decoder's parameters are all in use.
    np.testing.assert_array_equal(params["embed"]["table"], source.read("model.embed_tokens.weight"))


def test_a_silent_memory_learns(source):
    """The scale at zero has a gradient, or the memory would stay silent for ever."""
    for name, parameter in (("lm2", "loudness"), ("titans_mag", "loudness"), ("titans_mal", "memory/o/w")):
        model = decoder_model(source, 16)
        grafted = graft(model, *MEMORIES[name])
        _, params = first_logits(source, grafted.model, grafted.start.zeros)
        language_model = LanguageModel(grafted.model)
        tokens = np.arange(64, dtype=np.int32).reshape(1, 64)

        def loss(params, language_model=language_model, tokens=tokens):
            return language_model.apply({"params": params}, tokens, language_model.init_state(1))[0].std()

        gradients = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params))
        found = [g for path, g in gradients if parameter in jax.tree_util.keystr(path, simple=True, separator="/")]
        assert found
        assert all(np.abs(g).max() > 0 for g in found)


def test_chosen_layers(source):
    grafted = graft(decoder_model(source, 16), *MEMORIES["lm2"], layers=(1,))
    assert grafted.model.join.memory_layers(2) == (1,)
    with pytest.raises(UserError, match="--layers"):
        graft(decoder_model(source, 16), *MEMORIES["rmt"], layers=(1,))
    with pytest.raises(UserError, match="does not fit the decoder"):
        graft(decoder_model(source, 16), *MEMORIES["lm2"], layers=(7,))


def test_a_silent_join_stays_silent():
    assert silent(silent(ResidualJoin()).join) == silent(ResidualJoin())
    assert silent(PRESETS["lm2_1p7b"].model.join).is_silent
