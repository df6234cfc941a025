"""Writes tests/interop/golden/*.npz: tiny random models of `transformers`, their logits, and their config.json.

Needs torch and transformers, which no test needs: python tests/interop/make_golden.py. Files that exist are kept.
Arrays were made with transformers 5.24.0 and torch 2.13.0.
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers

GOLDEN = pathlib.Path(__file__).parent / "golden"
BASE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}  # pairs on both sides of the ramp
NOT_IN_GPT2 = ("intermediate_size", "num_key_value_heads")
CONFIGS = {
    "llama1_untied": {},
    "tied": {"tie_word_embeddings": True},
    "grouped_queries": {"num_key_value_heads": 2, "num_hidden_layers": 3},
    "one_kv_head": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama3_scaling": {"num_key_value_heads": 2, "rope_parameters": LLAMA3},
    "llama32_tied_scaling": {
        "tie_word_embeddings": True,
        "rope_parameters": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 16},
    },
    "odd_vocabulary": {"vocab_size": 97, "intermediate_size": 37},
    "head_width": {"head_dim": 8, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 21},
    "smollm2": {
        "hidden_size": 18,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "rms_norm_eps": 1e-5,
    },
    "mistral": {"kind": "Mistral", "sliding_window": None, "num_key_value_heads": 2, "head_dim": 4},
    "attention_bias": {"attention_bias": True, "num_key_value_heads": 2},
    "linear_scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    "dynamic_scaling": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}},
    "yarn_scaling": {"rope_parameters": YARN, **WIDE_HEADS},
    "yarn_attention_factor": {
        "kind": "Mistral",
        "sliding_window": None,
        "rope_parameters": {**YARN, "attention_factor": 1.5, "beta_fast": 4.0, "beta_slow": 0.5},
        **WIDE_HEADS,
    },
    "yarn_mscale": {
        "rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.7, "truncate": False},
        **WIDE_HEADS,
    },
    "qwen2": {"kind": "Qwen2", "tie_word_embeddings": True, "num_key_value_heads": 2},
    "qwen2_yarn": {"kind": "Qwen2", "rope_parameters": {**YARN, "rope_theta": 1e6}, **WIDE_HEADS},
    "qwen3": {"kind": "Qwen3", "tie_word_embeddings": True, "num_key_value_heads": 2, "head_dim": 6},
    "qwen3_bias_scaling": {
        "kind": "Qwen3",
        "attention_bias": True,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16},
    },
    "gpt2": {"kind": "GPT2", "tie_word_embeddings": True},
    "gpt2_untied": {"kind": "GPT2", "n_inner": 37, "layer_norm_epsilon": 1e-3, "num_hidden_layers": 3},
}


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for seed, (name, changes) in enumerate(CONFIGS.items()):
        if (GOLDEN / f"{name}.npz").exists():
            continue
        fields = {**BASE, **changes}
        kind = fields.pop("kind", "Llama")
        if kind == "GPT2":
            fields = {name: value for name, value in fields.items() if name not in NOT_IN_GPT2}
        config_class = getattr(transformers, f"{kind}Config")
        model_class = getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")
        torch.manual_seed(seed)
        model = model_class(config_class(**fields)).eval()
        with torch.no_grad():
            for key, value in model.named_parameters():  # larger than the library's 0.02, so that errors show
                is_norm = "norm" in key or ("ln_" in key and "bias" not in key)
                value.normal_(1.0 if is_norm else 0.0, 0.2 if is_norm else 0.3)
        tokens = np.random.default_rng(seed).integers(0, fields["vocab_size"], (2, 48))
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits.numpy()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config = json.loads((pathlib.Path(folder) / "config.json").read_text())
        weights = {f"w:{key}": value.detach().numpy() for key, value in model.named_parameters()}
        np.savez_compressed(
            GOLDEN / f"{name}.npz", config=json.dumps(config), tokens=tokens.astype(np.int32), logits=logits, **weights
        )
        print(name, logits.shape, float(np.abs(logits).max()))


if __name__ == "__main__":
    main()
