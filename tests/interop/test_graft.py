"""A memory added to a pretrained decoder: what its first logits are, for every memory and join that is registered."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax.blocks import JOINS
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.config import ModelConfig, RunConfig
from lm2_jax.errors import UserError
from lm2_jax.interop.graft import Grafted, graft, silent
from lm2_jax.interop.hf_config import read_hf_config
from lm2_jax.interop.load import load_params, source_reader
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.workdir import decoder_model
from lm2_jax.memory.base import MemoryConfig
from lm2_jax.memory.none import NoMemory
from lm2_jax.model import LanguageModel
from lm2_jax.presets import PRESETS
from lm2_jax.training.state import make_plan
from tests.interop.folders import TINY, hf_folder

TOKENS = 32  # of a segment

# Joins whose method allows no silent start: mean divergence in nats, KL(decoder || with memory), of the next-token
# distributions of this file's random decoder, as measured. docs/bring_your_own_model.md says why.
MEASURED = {
    "gated_delta": 1.12,
    "gated_delta+context": 0.415,
    "hmt": 0.243,
    "hybrid": 0.218,
    "lm2_context": 0.608,
    "rmt": 0.303,
    "titans_lmm": 1.18,
    "titans_mac": 0.748,
}


def all_grafts() -> dict[str, Grafted]:
    """Every memory and join of a tiny preset, and each pair of registered kinds that fits with their default fields."""
    spec = read_hf_config(TINY, "TINY")
    model = ModelConfig(spec.vocab_size, TOKENS, spec.decoder, NoMemory(), PlainJoin())
    models = {
        name: run.model for name, run in PRESETS.items() if name.endswith("_tiny") and run.model.decoder.width <= 64
    }
    grafts = {name.removesuffix("_tiny"): graft(model, m.memory, m.join) for name, m in models.items()}
    kinds = {(m.memory.kind, m.join.kind) for m in models.values()}
    for memory_kind, memory in MemoryConfig.registry.items():
        for join_kind, join in JOINS.items():
            if (memory_kind, join_kind) not in kinds:
                try:
                    grafts[f"{memory_kind}+{join_kind}"] = graft(model, memory(), join())
                except UserError:
                    continue  # the registries do not let the two meet
    return grafts


GRAFTS = all_grafts()


@pytest.fixture(autouse=True, scope="module")
def each_operation_as_written() -> Iterator[None]:
    """XLA's optimisations fuse the operations of different programs differently, which changes last bits."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
    """The decoder's logits in each of the two orders of computation, which round differently."""
    model = decoder_model(source, TOKENS)
    orders = ("layer_major", "segment_major")
    return {order: first_logits(source, dataclasses.replace(model, schedule=order))[0] for order in orders}


def divergence(expected: np.ndarray, logits: np.ndarray) -> float:
    p, q = (np.asarray(jax.nn.log_softmax(x.astype(np.float64))) for x in (expected, logits))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_every_memory_and_join_is_here():
    models = [grafted.model for grafted in GRAFTS.values()]
    parts = [part for model in models for part in getattr(model.join, "parts", ())]
    assert {x.memory.kind for x in (*models, *parts)} == set(MemoryConfig.registry)
    assert {x.join.kind for x in (*models, *parts)} == set(JOINS)
    assert {name for name, grafted in GRAFTS.items() if not grafted.start.is_silent} >= MEASURED.keys()


@pytest.mark.parametrize("name", list(GRAFTS))
def test_a_start_that_is_not_silent_has_a_reason(name):
    assert GRAFTS[name].start.is_silent != bool(GRAFTS[name].start.reason)


def marked(name: str):
    """Cheap ones are fast tests, one of each join is slow, all others are long."""
    fast, slow = ("lm2", "rmt"), ("gated_delta", "lm2_context", "lm2_paper", "lm2_threaded", "titans_mag", "titans_mal")
    return name if name in fast else pytest.param(name, marks=pytest.mark.slow if name in slow else pytest.mark.long)


@pytest.mark.parametrize("name", [marked(name) for name in GRAFTS])
def test_the_first_logits(name, source, decoder):
    grafted = GRAFTS[name]
    has_stack = grafted.model.join.stack(grafted.model.block_spec, parent=None) is not None
    expected = decoder["segment_major" if has_stack else "layer_major"]
    logits, params = first_logits(source, grafted.model, grafted.start.zeros)
    np.testing.assert_array_equal(params["embed"]["table"], source.read("model.embed_tokens.weight"))
    assert np.isfinite(logits).all()
    if grafted.start.is_silent:
        np.testing.assert_array_equal(logits, expected)
        return
    found = divergence(expected, logits)
    print(f'    "{name}": {found:.3g},')
    assert found > 0
    if name in MEASURED:
        assert MEASURED[name] / 2 < found < 2 * MEASURED[name]


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        pytest.param("lm2", "loudness", marks=pytest.mark.slow),
        pytest.param("titans_mag", "loudness", marks=pytest.mark.long),
        pytest.param("titans_mal", "memory/o/w", marks=pytest.mark.long),
    ],
)
def test_a_silent_memory_learns(name, parameter, source):
    """What starts at zero has a gradient, or the memory would stay silent for ever."""
    grafted = GRAFTS[name]
    _, params = first_logits(source, grafted.model, grafted.start.zeros)
    model, tokens = LanguageModel(grafted.model), jnp.arange(2 * TOKENS).reshape(1, -1)

    def loss(params):
        return model.apply({"params": params}, tokens, model.init_state(1))[0].std()

    gradients = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params))
    found = [g for path, g in gradients if parameter in jax.tree_util.keystr(path, simple=True, separator="/")]
    assert found
    assert all(np.abs(g).max() > 0 for g in found)


def test_chosen_layers(source):
    memories = {name: PRESETS[f"{name}_tiny"].model for name in ("lm2", "rmt")}
    model, lm2, rmt = decoder_model(source, 16), memories["lm2"], memories["rmt"]
    assert graft(model, lm2.memory, lm2.join, layers=(1,)).model.join.memory_layers(2) == (1,)
    with pytest.raises(UserError, match="--layers"):
        graft(model, rmt.memory, rmt.join, layers=(1,))
    with pytest.raises(UserError, match="does not fit the decoder"):
        graft(model, lm2.memory, lm2.join, layers=(7,))


def test_a_silent_join_stays_silent():
    assert silent(silent(ResidualJoin()).join) == silent(ResidualJoin())
    assert silent(PRESETS["lm2_1p7b"].model.join).is_silent
