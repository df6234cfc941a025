"""Low-rank adapters: a start that changes nothing, what is trained, and the export without them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax.config import RunConfig
from lm2_jax.decoder import PROJECTIONS, LoraConfig
from lm2_jax.interop.export import export_workdir
from lm2_jax.interop.load import load_params, source_reader
from lm2_jax.interop.lora import merge_lora
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.pretrained import from_pretrained
from lm2_jax.interop.workdir import decoder_model
from lm2_jax.model import LanguageModel
from lm2_jax.presets import PRESETS
from lm2_jax.runs import Run
from lm2_jax.training.optim_config import OptimConfig
from lm2_jax.training.state import make_plan
from tests.interop.folders import TINY, hf_folder

ALL = LoraConfig(rank=3, alpha=6.0, targets=("attention/*", "mlp/*"))


@pytest.fixture(autouse=True, scope="module")
def each_operation_as_written():
    """See test_graft.py."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(hf_folder(tmp_path_factory.mktemp("llama") / "hf", {**TINY, "attention_bias": True}))


def with_lora(model, lora=ALL):
    return dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, lora=lora))


def loaded(source, model) -> Run:
    plan = make_plan(RunConfig(model=model), LanguageModel(model))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(plan, jax.tree.map(lambda _: place, plan.shapes.params), source_reader(source))
    return Run(plan.config, plan.model, params, None, 0)  # pyright: ignore[reportArgumentType]


def logits(run: Run) -> np.ndarray:
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 300, (2, 16), np.int32))
    return np.asarray(jax.jit(run.model.apply)({"params": run.params}, tokens, run.model.init_state(2))[0])


def trained(run: Run) -> Run:
    """B as after some training."""

    def fill(path, leaf):
        is_b = path[-1].key == "lora_b"
        return jax.random.normal(jax.random.key(len(path)), leaf.shape, leaf.dtype) * 0.1 if is_b else leaf

    return run._replace(params=jax.tree_util.tree_map_with_path(fill, run.params))


def test_adapters_change_nothing_at_first_and_are_merged(source):
    plain = loaded(source, decoder_model(source, 16))
    adapted = loaded(source, with_lora(plain.config.model))
    expected = logits(plain)
    np.testing.assert_array_equal(logits(adapted), expected)
    for a, b in zip(jax.tree.leaves(merge_lora(adapted).params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_array_equal(a, b)
    after = trained(adapted)
    changed, merged = logits(after), merge_lora(after)
    assert np.abs(changed - expected).max() > 0.1
    assert jax.tree.structure(merged.params) == jax.tree.structure(plain.params)
    assert merged.config.model == plain.config.model
    np.testing.assert_allclose(logits(merged), changed, atol=1e-4)


def test_an_export_is_merged(source, tmp_path, monkeypatch):
    run = trained(loaded(source, with_lora(decoder_model(source, 16))))
    run = run._replace(tokenizer=from_pretrained(source.where).tokenizer)
    monkeypatch.setattr("lm2_jax.interop.export.load_run", lambda _: run)
    export_workdir("workdir", tmp_path / "out")
    back = from_pretrained(tmp_path / "out").params
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(merge_lora(run).params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_frozen_parameters_have_no_optimizer_state():
    """With `decoder` frozen, adapters and memory alone are trained."""
    lm2 = PRESETS["lm2_tiny"]
    model = with_lora(lm2.model)
    run = dataclasses.replace(lm2, model=model, optim=OptimConfig(freeze=("decoder",)))
    plan = make_plan(run, LanguageModel(model))
    paths = {
        p.path: is_trained
        for p, is_trained in zip(jax.tree.leaves(plan.parameters), jax.tree.leaves(plan.trainable), strict=True)
    }
    adapters = {path for path in paths if "/lora_" in path}
    assert len(adapters) == 2 * len(PROJECTIONS)
    assert all(paths[path] for path in adapters)
    assert all(is_trained for path, is_trained in paths.items() if "memory" in path or "gate_output" in path)
    assert not any(paths[path] for path in ("embed/table", "final_norm/scale", "blocks_0/attention/q_proj/w"))
    sizes = [
        leaf.size
        for leaf, kept in zip(jax.tree.leaves(plan.shapes.params), jax.tree.leaves(plan.trainable), strict=True)
        if kept
    ]
    found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(plan.shapes.opt_state) if leaf.ndim)
    assert found == 2 * 4 * sum(sizes)  # two moments in float32


@pytest.mark.parametrize("targets", [("attention/*",), ("mlp/down",)])
def test_chosen_projections(targets):
    model = with_lora(PRESETS["none_tiny"].model, LoraConfig(rank=2, targets=targets))
    plan = make_plan(RunConfig(model=model), LanguageModel(model))
    found = {p.path.rsplit("/", 1)[0] for p in jax.tree.leaves(plan.parameters) if p.group == "lora"}
    assert found == {f"blocks_0/{name}" for name in PROJECTIONS if name.startswith(targets[0].removesuffix("*"))}


def test_bad_adapters():
    with pytest.raises(ValueError, match=r"'attention/query' matches no projection; there are attention/q_proj"):
        LoraConfig(rank=1, targets=("attention/query",))
    with pytest.raises(ValueError, match="targets is empty"):
        LoraConfig(rank=1, targets=())
    with pytest.raises(ValueError, match=r"model\.decoder\.lora\.rank"):
        LoraConfig(rank=-1)
