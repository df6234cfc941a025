"""Checkpoints of tiny models, written on the spot."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lm2_jax.data.tokenizers import TokenizerConfig, build_tokenizer
from lm2_jax.interop.architectures import architecture_of
from lm2_jax.interop.gpt2_names import in_files
from lm2_jax.interop.hf_config import read_hf_config
from lm2_jax.interop.names import hf_shapes
from lm2_jax.interop.safetensors_file import write_safetensors

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    spec, rng = read_hf_config(config, "config.json"), np.random.default_rng(seed)
    shapes, architecture = hf_shapes(spec.decoder, spec.vocab_size), architecture_of(spec.decoder)
    arrays = {
        name: (rng.standard_normal(shape) * (0.2 if len(shape) == 2 else 0.1) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    assert architecture is not None
    places = architecture.places(spec.decoder) if architecture.places else {}
    stored, read = in_files(places, shapes, arrays.__getitem__)
    return {name: read(name) for name in stored}


def save(path: Path, weights: dict[str, np.ndarray]) -> None:
    write_safetensors(path, {n: (a.shape, a.dtype) for n, a in weights.items()}, weights.__getitem__, {"format": "pt"})


def hf_folder(
    folder: Path,
    config: dict[str, Any] = TINY,
    weights: dict[str, np.ndarray] | None = None,
    shards: int = 1,
    tokenizer: bool = True,
) -> Path:
    """A Hugging Face folder; the tokenizer has 259 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = random_weights(config) if weights is None else weights
    if shards == 1:
        save(folder / "model.safetensors", weights)
    else:
        names = list(weights)
        places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
        for file in set(places.values()):
            save(folder / file, {name: weights[name] for name in names if places[name] == file})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    if tokenizer:
        encoder = build_tokenizer(TokenizerConfig(kind="bytes"), list, 259)
        (folder / "tokenizer.json").write_bytes(encoder.serialized())
        (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return folder
