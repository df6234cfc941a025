"""Checkpoints of the released RMT and ARMT, whose outputs are in tests/parity/golden."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

import lm2_jax
from lm2_jax import UserError
from lm2_jax.blocks.layer_tokens import LayerTokensJoin
from lm2_jax.blocks.tokens import TokensJoin
from lm2_jax.commands.import_hf import report
from lm2_jax.config import RunConfig
from lm2_jax.interop.load import source_reader
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.pretrained import read_decoder
from lm2_jax.interop.workdir import import_source
from lm2_jax.memory.associative import AssociativeConfig
from lm2_jax.memory.tokens import TokensConfig
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from tests.interop.folders import TINY, hf_folder, random_weights

GOLDEN = Path(__file__).parents[1] / "parity" / "golden"
BACKBONE = {
    **TINY,
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 40,
    "n_embd": 16,
    "n_inner": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
}
EXPECTED = {
    "rmt": (TokensConfig(num_tokens=2), TokensJoin()),
    "armt": (AssociativeConfig(num_tokens=2, key_width=4), LayerTokensJoin()),
}
EXPECTED |= {f"{name}_gpt2": parts for name, parts in EXPECTED.items()}


def golden_weights(name):
    """As the released code names its tensors: the golden's wrapper for newer transformers is left out."""
    with np.load(GOLDEN / f"{name}_official.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    weights = {
        key.removeprefix("weights/").replace(".layer.inner.", ".layer."): array
        for key, array in arrays.items()
        if key.startswith("weights/")
    }
    return weights, arrays


def golden_folder(name, folder, shards=1):
    weights, arrays = golden_weights(name)
    return hf_folder(folder, GPT2 if "gpt2" in name else BACKBONE, weights, shards, tokenizer=False), arrays


def wrapped(config, tokens=3):
    """A random RMT around a random Llama."""
    weights = {f"memory_cell.model.{name}": array for name, array in random_weights(config).items()}
    start = np.random.default_rng(1).standard_normal((tokens, config["hidden_size"])).astype(np.float32)
    return weights | {"memory_cell.memory": start}


@pytest.mark.parametrize("name", EXPECTED)
def test_logits_and_memory_equal_those_of_the_released_code(name, tmp_path):
    folder, golden = golden_folder(name, tmp_path, shards=3)
    decoder = read_decoder(open_source(folder), segment_tokens=6)
    assert (decoder.config.memory, decoder.config.join) == EXPECTED[name]
    state = decoder.model.init_state(2)
    with jax.default_matmul_precision("highest"):
        logits, after = jax.jit(decoder.model.apply)({"params": decoder.params}, golden["tokens"], state)
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-4, atol=1e-4)
    held = {"memory": after.stack.tokens} if name.startswith("rmt") else after.groups[0].memory._asdict()
    for key in {"memory", "matrix", "norm"} & held.keys() & golden.keys():
        np.testing.assert_allclose(held[key], golden[key], rtol=1e-4, atol=1e-4 * np.abs(golden[key]).max())


def test_an_import_is_a_run_with_its_memory(tmp_path):
    folder = hf_folder(tmp_path / "rmt", weights=wrapped(TINY))
    layout = Layout(make_mesh(MeshConfig()))
    source = open_source(folder)
    imported = import_source(source, tmp_path / "run", layout, segment_tokens=8)
    assert "memory 'tokens' with join 'tokens': trained with the decoder" in report(imported, "w", 1.0)
    origin = json.loads((tmp_path / "run" / "origin.json").read_text())
    assert (origin["memory"], origin["starts_as_the_decoder"]) == ("tokens", False)
    run, decoder = lm2_jax.load_run(epath.Path(tmp_path / "run")), read_decoder(source, segment_tokens=8)
    assert run.config.model.memory == TokensConfig(num_tokens=3)
    jax.tree.map(np.testing.assert_array_equal, run.params, decoder.params)
    with pytest.raises(UserError, match="has a memory of its own, 'tokens'; leave --memory out"):
        import_source(source, tmp_path / "no", layout, memory=RunConfig())
    assert not (tmp_path / "no").exists()


def test_a_run_with_other_sizes_is_refused(tmp_path):
    source = open_source(hf_folder(tmp_path, weights=wrapped(TINY)))
    with pytest.raises(UserError, match=r"memory has the shape \[3, 32\], which does not fit .* \[5, 32\]"):
        source_reader(source).read("carrier/memory/start", (5, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("memory_cell.memory"), "no tensor 'memory_cell.memory'"),
        (lambda w: w.update({"memory_cell.extra": np.zeros(3, np.float32)}), "extra: the decoder has no such"),
        (lambda w: w.pop("memory_cell.model.model.norm.weight"), "model.norm.weight: missing"),
        (lambda w: w.update({"memory_cell.model.model.layers.0.W_mq.weight": np.zeros((4, 32), np.float32)}),
         r"model\.layers\.0\.W_mk\.weight: missing"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(change, message, tmp_path):
    weights = wrapped(TINY)
    change(weights)
    with pytest.raises(UserError, match=message):
        open_source(hf_folder(tmp_path, weights=weights))


def test_an_armt_whose_memory_tokens_have_positions_of_the_text_is_refused(tmp_path):
    """Its result would depend on the length of a segment; the released code's default gives them their own."""
    weights, _ = golden_weights("armt_gpt2")
    weights["memory_cell.model.transformer.wpe.weight"] = weights["memory_cell.model.transformer.wpe.weight"][:32]
    with pytest.raises(
        UserError, match=r"its 32 learned positions are not the 32 of n_positions and one for each of 2"
    ):
        open_source(hf_folder(tmp_path / "cut", GPT2, weights, tokenizer=False))


def test_pickles_are_refused(tmp_path):
    hf_folder(tmp_path, weights=wrapped(TINY))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="its weights are pickles"):
        open_source(tmp_path)
