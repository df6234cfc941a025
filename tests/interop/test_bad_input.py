"""What cannot be imported is refused with one message that says what was expected."""

import dataclasses
import json
import struct

import numpy as np
import pytest

from lm2_jax.blocks.tokens import TokensJoin
from lm2_jax.errors import UserError
from lm2_jax.interop import hub
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.pretrained import from_pretrained
from lm2_jax.memory.tokens import TokensConfig
from lm2_jax.rope import YarnScaling
from tests.interop.folders import TINY, hf_folder, random_weights

QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}
MISTRAL = {"architectures": ["MistralForCausalLM"], "sliding_window": None}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 300,
    "n_embd": 16,
    "n_inner": None,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM.*not supported.*Qwen3ForCausalLM"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "'Qwen2MoeForCausalLM' is not supported"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "'Qwen3MoeForCausalLM' is not supported"),
        ({"architectures": ["Qwen2ForCausalLM"]}, r"q_proj\.bias: missing"),
        ({"architectures": ["Qwen3ForCausalLM"]}, r"q_norm\.weight: missing"),
        ({**QWEN2, "use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({**QWEN2, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({**QWEN2, "mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"architectures": ["MistralForCausalLM"]}, "sliding_window=4096 is not supported"),
        ({**MISTRAL, "attention_bias": True}, "attention_bias=True is not supported"),
        ({"architectures": None, "model_type": "gemma"}, "gemma.*not supported"),
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "never run"),
        ({"attention_bias": True}, r"o_proj\.bias: missing"),
        ({"attention_bias": "yes"}, "attention_bias='yes' is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"use_qk_norm": True}, "use_qk_norm=True"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "RoPE type 'su' is not supported; supported: .*'?yarn"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "RoPE type 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "of type 'yarn': factor: expected a number"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, r"rope_scaling\.factor must be at least 1, got 0\.5"),
        ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_fast=1.0 must not be below beta_slow=2.0"),
        ({"rope_scaling": {**YARN, "beta_fast": "32"}}, "beta_fast: expected a number, got '32'"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate: expected true or false, got 1"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0.5}}, "embeddings: expected a positive int"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta=1.0 must be above 1"),
        ({"rope_scaling": {"type": "linear"}}, "of type 'linear': factor: expected a number, got None"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": None}, "max_position_embedd"),
        ({"rope_scaling": [2.0]}, "rope_scaling: expected a table"),
        ({"rope_parameters": {"full_attention": YARN}}, "a RoPE for each kind of layer is not supported"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 9.0}}, "low_frequency_factor=9.0 must be below"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: expected a number"),
        ({"hidden_size": "32"}, "hidden_size: expected a positive integer"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"intermediate_size": 48}, "expected shape"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight: missing"),
        ({"num_hidden_layers": 1}, "no such parameter"),
        ({"tie_word_embeddings": False}, "lm_head.weight: missing"),
    ],
)
def test_a_config_that_does_not_fit(changes, message, tmp_path):
    folder = hf_folder(tmp_path)
    (folder / "config.json").write_text(json.dumps({**TINY, **changes}))
    with pytest.raises(UserError, match=message):
        open_source(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "gelu"}, "activation_function='gelu' is not supported.*='gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ({"n_embd": None}, "n_embd: expected a positive integer, got None"),
        ({"n_positions": "64"}, "n_positions: expected a positive integer, got '64'"),
        ({"n_positions": None}, "n_positions: expected a positive integer, got None"),
        ({"n_positions": 0}, "max_positions"),
        ({"n_positions": 65}, r"embed_positions.weight: expected shape \[65, 16\].*got \[64, 16\]"),
        ({"n_head": 3}, "decoder.width=16 is not a multiple of decoder.num_heads=3"),
        ({"n_inner": 40}, r"up_proj.weight: expected shape \[40, 16\].*got \[64, 16\]"),
        ({"n_layer": 3}, r"layers\.2\.\S*: missing"),
        ({"tie_word_embeddings": False}, "lm_head.weight: missing"),
    ],
)
def test_a_gpt2_that_does_not_fit(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        open_source(hf_folder(tmp_path, {**GPT2, **changes}, random_weights(GPT2)))
    assert caught.value.status == 1


def test_tensors_of_a_gpt2_that_are_not_its_own(tmp_path):
    weights = random_weights(GPT2)
    weights["transformer.h.0.attn.c_attn.weight"] = np.zeros((16, 47), np.float32)
    weights["transformer.h.0.attn.extra"] = np.zeros(3, np.float32)
    del weights["transformer.h.1.ln_1.bias"]
    with pytest.raises(UserError) as caught:
        open_source(hf_folder(tmp_path, GPT2, weights))
    for part in (
        "layers.1.input_layernorm.bias: missing",
        "layers.0.self_attn.q_proj.weight: expected shape [16, 16] as the config says, got [47, 16]",
        "transformer.h.0.attn.extra: the decoder has no such parameter",
    ):
        assert part in str(caught.value)


def test_old_files_of_a_gpt2_leave_the_prefix_out_and_hold_masks(tmp_path):
    weights = random_weights(GPT2)
    old = {name.removeprefix("transformer."): array for name, array in weights.items()}
    old |= {f"h.{i}.attn.{kind}": np.ones((1, 1, 4, 4), np.float32) for i in (0, 1) for kind in ("bias", "masked_bias")}
    first, second = (
        open_source(hf_folder(tmp_path / "a", GPT2, weights)),
        open_source(hf_folder(tmp_path / "b", GPT2, old)),
    )
    assert first.shapes() == second.shapes()
    for name in first.shapes():
        np.testing.assert_array_equal(first.read(name), second.read(name))


def test_tensors_the_decoder_lacks(tmp_path):
    weights = random_weights(TINY) | {"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)}
    with pytest.raises(UserError, match=r"q_norm.weight: the decoder has no such parameter"):
        open_source(hf_folder(tmp_path, weights=weights))


def test_a_missing_shard(tmp_path):
    folder = hf_folder(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 3 shards are missing: model-00002-of-00003"):
        open_source(folder)


def test_an_index_that_leaves_the_folder(tmp_path):
    folder = hf_folder(tmp_path, shards=2)
    index = folder / "model.safetensors.index.json"
    plain = json.loads(index.read_text())
    plain["weight_map"]["model.norm.weight"] = "../model.safetensors"
    index.write_text(json.dumps(plain))
    with pytest.raises(UserError, match="outside the folder"):
        open_source(folder)


@pytest.mark.parametrize("cut", [0, 4, 100, 5000, -1])
def test_a_truncated_file(cut, tmp_path):
    file = hf_folder(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"truncated|damaged|not a safetensors file"):
        open_source(tmp_path)


def test_random_damage_of_a_header_is_one_message(tmp_path):
    file = hf_folder(tmp_path, tokenizer=False) / "model.safetensors"
    content, rng = file.read_bytes(), np.random.default_rng(0)
    length = int.from_bytes(content[:8], "little")
    for _ in range(200):
        damaged = bytearray(content)
        damaged[int(rng.integers(0, 8 + length))] = int(rng.integers(0, 256))
        file.write_bytes(damaged)
        try:
            open_source(tmp_path)
        except UserError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused(name, tmp_path):
    folder = hf_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UserError, match="Convert to safetensors"):
        open_source(folder)
    (tmp_path / "checkpoint.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match="Convert to safetensors"):
        open_source(tmp_path / "checkpoint.bin")


def test_files_that_are_no_checkpoint(tmp_path):
    for name, content in {
        "a.bin": struct.pack("<7i", 1, 2, 3, -4, 5, 6, 7),
        "b.bin": b"1234",
        "c.txt": b"text",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"llama2\.c|not a checkpoint"):
            open_source(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no such file"):
        open_source(tmp_path / "empty")
    with pytest.raises(UserError, match="no such file or folder"):
        open_source(tmp_path / "absent")


def test_a_damaged_gguf_file(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(30))
    with pytest.raises(UserError, match="not a GGUF file"):
        open_source(tmp_path / "a.gguf")


def test_a_llama2c_file_of_another_length(data_dir, tmp_path):
    file = data_dir / "checkpoints" / "stories260K" / "stories260K.bin"
    if not file.exists():
        pytest.skip(f"no checkpoint: {file} does not exist")
    (tmp_path / "a.bin").write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="truncated"):
        open_source(tmp_path / "a.bin")


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path):
    folder = hf_folder(tmp_path, {**TINY, "vocab_size": 200})
    with pytest.raises(UserError, match=r"tokenizer has 259 tokens, but the model has a vocabulary of 200"):
        from_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer"):
        from_pretrained(folder)


def test_a_hub_name_without_a_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("We couldn't connect to the hub")

    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"'owner/model' is no path .* cannot be fetched: We couldn't connect"):
        open_source("owner/model")
    assert not hub.is_hub_name("runs/a/b")


def test_dynamic_scaling_beyond_the_original_length(tmp_path):
    """As far as the frequencies do not depend on the text's length it is read, and beyond that refused with advice."""
    folder = hf_folder(tmp_path, {**TINY, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    config = from_pretrained(folder).config.model
    assert config.segment_tokens == 64
    with pytest.raises(ValueError, match=r"decoder\.max_tokens is 65, .*'dynamic' is supported up to.*=64") as caught:
        dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, max_tokens=65))
    assert "rope_scaling 'yarn'" in str(caught.value)
    dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, max_tokens=64))
    dataclasses.replace(
        config, decoder=dataclasses.replace(config.decoder, max_tokens=65, rope_scaling=YarnScaling(original_tokens=64))
    )
    with pytest.raises(ValueError, match=r"model\.segment_tokens \(with memory tokens\) is 66"):
        dataclasses.replace(config, memory=TokensConfig(num_tokens=1), join=TokensJoin())


def test_a_segment_longer_than_the_training(tmp_path):
    with pytest.raises(UserError, match="at most 64 tokens"):
        from_pretrained(hf_folder(tmp_path), segment_tokens=65)
