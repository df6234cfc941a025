"""Outputs of the released code of RMT and ARMT on random weights; golden/README.md says how they were made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import lm2_jax
from lm2_jax.blocks.layer_tokens import LayerTokensJoin
from lm2_jax.blocks.tokens import TokensJoin
from lm2_jax.config import ModelConfig
from lm2_jax.decoder import DecoderConfig
from lm2_jax.memory.associative import AssociativeConfig
from lm2_jax.memory.tokens import TokensConfig

FOLDER = Path(__file__).parent / "golden"
HEADS, LAYERS, SEGMENT, MEMORY_TOKENS, KEY_WIDTH = 4, 2, 6, 2, 4
DECODER = DecoderConfig(width=16, num_layers=LAYERS, num_heads=HEADS, num_kv_heads=2, mlp_width=24)

# Where our parameter is in theirs; `{}` is the layer. Theirs are [out in], ours [in out].
PROJECTIONS = {
    "attention/q_proj/w": "self_attn.q_proj",
    "attention/k_proj/w": "self_attn.k_proj",
    "attention/v_proj/w": "self_attn.v_proj",
    "attention/o_proj/w": "self_attn.o_proj",
    "mlp/gated/w": "mlp.gate_proj",
    "mlp/up/w": "mlp.up_proj",
    "mlp/down/w": "mlp.down_proj",
    "attention_norm/scale": "input_layernorm",
    "mlp_norm/scale": "post_attention_layernorm",
}
MEMORY = {"memory/q/w": "W_mq", "memory/k/w": "W_mk", "memory/v/w": "W_mv", "memory/gate_rate": "W_mb"}


def load(
    name: str, model: Any, start: str, inner: str = "", own: Callable[[Any], Any] = lambda golden: {}
) -> tuple[Any, Any]:
    """Their arrays, and our parameters filled with their weights.

    Args:
      name: of the file.
      model: ours.
      start: where the first memory tokens are.
      inner: what their wrapper of a layer puts before the names of the layer's own weights.
      own: makes more of our parameters, by path, of their arrays.
    """
    golden = np.load(FOLDER / f"{name}_official.npz")
    weights = {key.removeprefix("weights/memory_cell."): golden[key] for key in golden.files if "weights/" in key}

    def layer(i: int, key: str) -> np.ndarray:
        return weights[f"model.model.layers.{i}.{key}"]

    theirs = {
        "embed/table": weights["model.model.embed_tokens.weight"],
        "final_norm/scale": weights["model.model.norm.weight"],
        start: weights["memory"],
        **own(golden),
    }
    for ours, key in PROJECTIONS.items():
        theirs[f"blocks_0/{ours}"] = np.stack([layer(i, f"{inner}{key}.weight").T for i in range(LAYERS)])
    if name == "armt":
        for ours, key in MEMORY.items():
            theirs[f"blocks_0/{ours}"] = np.stack([layer(i, f"{key}.weight").T for i in range(LAYERS)])
        theirs["blocks_0/memory/rate_bias/b"] = np.stack([layer(i, "W_mb.bias") for i in range(LAYERS)])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, SEGMENT), int), model.init_state(1))["params"]

    def fill(path: Any, leaf: Any) -> jax.Array:
        return jnp.asarray(theirs[jax.tree_util.keystr(path, simple=True, separator="/")].reshape(leaf.shape))

    params = jax.tree_util.tree_map_with_path(fill, nn.unbox(shapes))
    assert sum(a.size for a in jax.tree.leaves(params)) == sum(a.size for a in weights.values()), "each has its place"
    return golden, params


def model_of(memory: Any, join: Any) -> Any:
    config = ModelConfig(vocab_size=40, segment_tokens=SEGMENT, decoder=DECODER, memory=memory, join=join)
    return lm2_jax.build_model(config)


def apply(model: Any, params: Any, tokens: np.ndarray) -> tuple[Any, Any]:
    with jax.default_matmul_precision("highest"):
        return jax.jit(model.apply)({"params": params}, jnp.asarray(tokens), model.init_state(len(tokens)))


def test_rmt_equals_the_released_code():
    """Logits of five segments and the memory after them."""
    model = model_of(TokensConfig(num_tokens=MEMORY_TOKENS), TokensJoin())
    golden, params = load("rmt", model, "carrier/memory/start")
    logits, state = apply(model, params, golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state.stack.tokens, golden["memory"], rtol=1e-4, atol=1e-4)
    alone, _ = apply(model, params, golden["tokens"][:, SEGMENT:])
    assert np.abs(alone - golden["logits"][:, SEGMENT:]).max() > 0.1, "the memory matters"


def test_armt_equals_the_released_code():
    """Logits of five segments, and A and z of each layer after them."""
    model = model_of(AssociativeConfig(num_tokens=MEMORY_TOKENS, key_width=KEY_WIDTH), LayerTokensJoin())
    golden, params = load("armt", model, "carrier/start", "layer.inner.")
    logits, state = apply(model, params, golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-4, atol=1e-4)
    for name in ("matrix", "norm"):
        got, expected = getattr(state.groups[0].memory, name), golden[name]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    alone, _ = apply(model, params, golden["tokens"][:, SEGMENT:])
    assert np.abs(alone - golden["logits"][:, SEGMENT:]).max() > 0.1, "the memory matters"
