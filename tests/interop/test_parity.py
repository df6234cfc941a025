"""Logits equal those of `transformers`, and what is exported is what was imported."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

import lm2_jax
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.config import ModelConfig
from lm2_jax.decoder import DecoderConfig
from lm2_jax.interop.architectures import ARCHITECTURES
from lm2_jax.interop.export import _write_shards, is_plain
from lm2_jax.interop.hf_config import read_hf_config, write_hf_config
from lm2_jax.interop.load import _stack_programs, array_reader
from lm2_jax.interop.names import hf_name, to_hf
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.pretrained import from_pretrained, read_decoder
from lm2_jax.interop.safetensors_file import SafetensorsFile
from lm2_jax.memory.none import NoMemory
from lm2_jax.model import LanguageModel
from lm2_jax.params import to_canonical, without_layers
from lm2_jax.rope import YarnScaling
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from tests.interop.folders import GOLDEN, TINY, hf_folder, random_weights


def golden_folder(path: Path, folder: Path, shards: int = 1) -> tuple[Path, np.ndarray, np.ndarray]:
    with np.load(path) as arrays:
        weights = {name.removeprefix("w:"): arrays[name] for name in arrays.files if name.startswith("w:")}
        config = json.loads(str(arrays["config"]))
        return hf_folder(folder, config, weights, shards, tokenizer=False), arrays["tokens"], arrays["logits"]


def logits_of(decoder, tokens: np.ndarray) -> np.ndarray:
    state = decoder.model.init_state(len(tokens))
    return np.asarray(jax.jit(decoder.model.apply)({"params": decoder.params}, tokens, state)[0])


NAMES = (
    *("llama1_untied", "tied", "grouped_queries", "one_kv_head", "llama3_scaling", "llama32_tied_scaling"),
    *("odd_vocabulary", "head_width", "smollm2", "mistral", "attention_bias", "linear_scaling", "dynamic_scaling"),
    *("yarn_scaling", "yarn_attention_factor", "yarn_mscale", "qwen2", "qwen2_yarn", "qwen3", "qwen3_bias_scaling"),
    *("gpt2", "gpt2_untied"),
)


def test_every_golden_is_there():
    assert {path.stem for path in GOLDEN} == set(NAMES)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_logits_equal_those_of_transformers_and_every_weight_comes_back(path, tmp_path):
    folder, tokens, logits = golden_folder(path, tmp_path / "hf", shards=3)
    source = open_source(folder)
    decoder = read_decoder(source, segment_tokens=tokens.shape[1])
    np.testing.assert_allclose(logits_of(decoder, tokens), logits, atol=1e-4, rtol=1e-4)
    read, shapes = array_reader(decoder.params), source.shapes()
    ours = {hf_name(name): name for name in to_canonical(decoder.params)}
    assert ours.keys() == shapes.keys()
    for name, shape in shapes.items():  # bit for bit
        np.testing.assert_array_equal(to_hf(ours[name], read(ours[name]), shape), source.read(name))


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_yarn",
        "gpt2_untied",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("attention_bias", "yarn_mscale", "qwen3_bias_scaling")),
    ],
)
def test_text_in_pieces_has_the_logits_of_transformers(name, tmp_path):
    """Through `stream`, within one segment and with the keys of a document of four segments."""
    folder, tokens, logits = golden_folder(next(path for path in GOLDEN if path.stem == name), tmp_path / "hf")
    one = read_decoder(open_source(folder), segment_tokens=48)
    full = dataclasses.replace(one.config.decoder, max_tokens=48)
    models = (one.model, LanguageModel(dataclasses.replace(one.config, segment_tokens=12, decoder=full)))
    for model in models:
        state, found = model.init_state(2), []
        for piece in np.split(tokens, [5, 24, 29], axis=1):
            out, state = lm2_jax.stream(model, one.params, piece, state)
            found.append(np.asarray(out))
        np.testing.assert_allclose(np.concatenate(found, axis=1), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_config_comes_back_from_an_export(path):
    with np.load(path) as arrays:
        spec = read_hf_config(json.loads(str(arrays["config"])), "config.json")
    plain = json.loads(json.dumps(write_hf_config(spec, "float32")))
    found = read_hf_config(plain, "config.json")
    explicit, again = (
        s._replace(
            decoder=dataclasses.replace(s.decoder, head_width=s.decoder.head_dim)
        )  # Qwen2's configs leave it out
        for s in (spec, found)
    )
    assert again == explicit
    assert (plain["architectures"][0], plain["model_type"]) in {(a.name, a.model_type) for a in ARCHITECTURES}


def test_the_older_names_of_rope_mean_the_same():
    with np.load(next(path for path in GOLDEN if path.stem == "yarn_mscale")) as arrays:
        new = json.loads(str(arrays["config"]))
    table = new.pop("rope_parameters")
    theta, kind = table.pop("rope_theta"), table.pop("rope_type")
    original = table.pop("original_max_position_embeddings")
    named = {**table, "type": kind, "original_max_position_embeddings": original}
    expected = read_hf_config({**new, "rope_parameters": {**named, "rope_theta": theta}}, "")
    assert expected.decoder.rope_scaling == YarnScaling(
        original_tokens=original, truncate=False, attention_factor=(1 + 0.2 * math.log(4)) / (1 + 0.07 * math.log(4))
    )
    assert read_hf_config({**new, "rope_theta": theta, "rope_scaling": named}, "") == expected
    # transformers lets the original length outside the table win, and takes the present one where there is none.
    outside = {**new, "rope_theta": theta, "original_max_position_embeddings": original}
    assert read_hf_config({**outside, "rope_scaling": {**named, "original_max_position_embeddings": 5}}, "") == expected
    del named["original_max_position_embeddings"]
    scaling = read_hf_config({**new, "rope_scaling": named}, "").decoder.rope_scaling
    assert isinstance(scaling, YarnScaling)
    assert scaling.original_tokens == new["max_position_embeddings"]


def test_a_decoder_that_transformers_lacks_has_a_folder_of_our_own():
    decoder = DecoderConfig(attention_bias="qkv", qk_norm=True)
    model = ModelConfig(decoder=decoder, memory=NoMemory(), join=PlainJoin())
    assert not is_plain(model)
    assert is_plain(dataclasses.replace(model, decoder=dataclasses.replace(decoder, qk_norm=False)))


def test_a_split_model_with_biases_and_norms_has_the_same_logits(tmp_path):
    config = {**TINY, "architectures": ["Qwen3ForCausalLM"], "attention_bias": True, "head_dim": 8}
    source = open_source(hf_folder(tmp_path, config))
    tokens = np.random.default_rng(0).integers(0, 300, (8, 64)).astype(np.int32)
    layout = Layout(make_mesh(MeshConfig(data=1, fsdp=4, model=2)))
    single, split = read_decoder(source), read_decoder(source, layout=layout)
    block = split.params["blocks_0"]["attention"]
    assert block["q_proj"]["b"].sharding.shard_shape((2, 4, 8)) == (2, 2, 8)
    assert block["q_norm"]["scale"].shape == (2, 8)
    with layout.context():
        found = logits_of(split, tokens)
    np.testing.assert_allclose(found, logits_of(single, tokens), atol=2e-5, rtol=2e-5)


def test_bfloat16_files_and_models(tmp_path):
    weights = {name: array.astype("bfloat16") for name, array in random_weights(TINY).items()}
    folder = hf_folder(tmp_path, weights=weights)
    narrow, wide = from_pretrained(folder, dtype="bfloat16"), from_pretrained(folder)
    for a, b in zip(jax.tree.leaves(narrow.params), jax.tree.leaves(wide.params), strict=True):
        assert (a.dtype, b.dtype) == ("bfloat16", "float32")
        np.testing.assert_array_equal(np.asarray(a, np.float32), b)


def test_files_are_those_of_the_safetensors_package(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    weights = random_weights(TINY)
    shapes = {name: array.shape for name, array in weights.items()}
    _write_shards(tmp_path, shapes, weights.__getitem__, np.dtype(np.float32), 10_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(safetensors.load_file(tmp_path / file)[name], weights[name])
    safetensors.save_file(weights, tmp_path / "theirs.safetensors")
    theirs = SafetensorsFile(tmp_path / "theirs.safetensors")
    for name, array in weights.items():
        np.testing.assert_array_equal(theirs.read(name), array)


def test_no_device_holds_more_than_its_shard(tmp_path):
    """Not even on the way: at each read of a tensor, every array on the devices is split."""
    source = open_source(hf_folder(tmp_path))
    layout = Layout(make_mesh(MeshConfig(data=1, fsdp=4, model=2)))
    single, read, seen = read_decoder(source), source.read, set()
    older = jax.live_arrays()  # held, so that no new array gets the id of one
    matrices = [leaf.shape for leaf in jax.tree.leaves(single.params) if leaf.ndim >= 2 and min(leaf.shape[-2:]) > 2]
    full = {*matrices, *(shape[1:] for shape in matrices if len(shape) > 2)}

    def watched(name):
        ids = set(map(id, older))
        for array in jax.live_arrays():
            if array.shape in full and id(array) not in ids:
                assert max(shard.data.size for shard in array.addressable_shards) < array.size, array.shape
                seen.add(array.shape)
        return read(name)

    source.read = watched
    split = read_decoder(source, layout=layout)
    assert {(300, 32), (2, 32, 4, 8), (2, 32, 40)} <= seen
    for a, b in zip(jax.tree.leaves(split.params), jax.tree.leaves(single.params), strict=True):
        assert isinstance(a.sharding, NamedSharding)
        assert len(a.sharding.device_set) == 8
        np.testing.assert_array_equal(a, b)
    table = split.params["embed"]["table"]
    assert max(shard.data.size for shard in table.addressable_shards) < table.size


def test_a_layer_is_put_into_its_stack_without_copies():
    """The program that does it has no temporary arrays and works in place, on each device's shard."""
    layout = Layout(make_mesh(MeshConfig(data=1, fsdp=4, model=2)))
    shape = jax.ShapeDtypeStruct((3, 32, 40), np.float32)
    sharding = layout.shardings(("layers", "embed", "mlp"), shape)
    _, put = _stack_programs(shape.shape, np.dtype(np.float32), sharding)
    stack = jax.ShapeDtypeStruct(shape.shape, np.float32, sharding=sharding)
    layer = jax.ShapeDtypeStruct(shape.shape[1:], np.float32, sharding=without_layers(sharding))
    memory = put.lower(stack, layer, jax.ShapeDtypeStruct((), np.int32)).compile().memory_analysis()
    shard = 4 * 3 * 32 * 40 // 8
    assert memory.output_size_in_bytes == memory.alias_size_in_bytes == shard
    assert memory.temp_size_in_bytes < shard
