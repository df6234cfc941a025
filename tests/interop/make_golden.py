"""Writes tests/interop/golden/*.npz: tiny random models of `transformers`, their logits, and their config.json.

Needs torch and transformers, which no test needs: python tests/interop/make_golden.py. Arrays were made with
transformers 5.24.0 and torch 2.13.0.
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
    "mistral": {"mistral": True, "sliding_window": None, "num_key_value_heads": 2, "head_dim": 4},
}


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for seed, (name, changes) in enumerate(CONFIGS.items()):
        fields = {**BASE, **changes}
        kinds = {
            True: (transformers.MistralConfig, transformers.MistralForCausalLM),
            False: (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        }
        config_class, model_class = kinds[fields.pop("mistral", False)]
        torch.manual_seed(seed)
        model = model_class(config_class(**fields)).eval()
        with torch.no_grad():
            for key, value in model.named_parameters():  # larger than the library's 0.02, so that errors show
                value.normal_(1.0 if "norm" in key else 0.0, 0.2 if "norm" in key else 0.3)
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
