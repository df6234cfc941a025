"""LM2's released module and model on random weights; golden/README.md says how they were made."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lm2_jax import UserError
from lm2_jax.interop.lm2_reference import MODULE, reference_memory, reference_weights, start_bank
from lm2_jax.interop.safetensors_file import SafetensorsFile
from tests.parity.reference import attended, rms_norm, rotated, swiglu

N, LAYERS, HEADS, KV_HEADS, MEMORY_HEADS = 16, 2, 4, 2, 2
FREQUENCIES = [10_000.0 ** (-2 * i / (N // HEADS)) for i in range(N // HEADS // 2)]


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "golden" / "lm2_official.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def of(golden, start):
    """Reads the arrays whose names begin so."""
    return lambda name: golden[f"{start}{name}"]


def attention(read, n_TD):
    """One layer's causal attention of one row, in numpy."""
    q, k, v = (n_TD @ read(f"self_attn.{name}_proj.weight").T for name in "qkv")
    keys = [rotated(row.reshape(KV_HEADS, -1), t, FREQUENCIES) for t, row in enumerate(k)]
    values = [row.reshape(KV_HEADS, -1) for row in v]
    out = [
        attended(rotated(q[t].reshape(HEADS, -1), t, FREQUENCIES), keys[: t + 1], values[: t + 1]).reshape(-1)
        for t in range(len(n_TD))
    ]
    return np.array(out) @ read("self_attn.o_proj.weight").T


def model_call(golden, tokens, bank):
    """The released model over one call of N tokens: logits, and the bank that the next call begins with."""
    read = of(golden, "weights/model.")
    x = read("embed_tokens.weight")[tokens].astype(np.float64)
    for index in range(LAYERS):
        layer = of(golden, f"weights/model.layers.{index}.")
        memory = reference_weights(of(golden, "weights/"), f"model.layers.{index}.{MODULE}.")
        a = np.stack([attention(layer, rms_norm(row, layer("input_layernorm.weight"))) for row in x])
        y, bank = jax.jit(reference_memory, static_argnums=3)(memory, jnp.asarray(a, jnp.float32), bank, MEMORY_HEADS)
        h = x + np.asarray(y, np.float64)
        mlp = {name: {"w": layer(f"mlp.{theirs}_proj.weight").T} for name, theirs in
               (("gated", "gate"), ("up", "up"), ("down", "down"))}  # fmt: skip
        x = h + swiglu(rms_norm(h, layer("post_attention_layernorm.weight")), mlp)
    return rms_norm(x, read("norm.weight")) @ read("embed_tokens.weight").T, bank


def test_the_released_model(golden):
    """Logits of two calls, and the bank after each: it runs through the layers, then into the next call."""
    tokens, bank, logits = golden["tokens"], start_bank(2, N), []
    for call in range(2):
        found, bank = model_call(golden, tokens[:, call * N : (call + 1) * N], bank)
        logits.append(found)
        np.testing.assert_allclose(bank, golden["banks"][call], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), golden["logits"], rtol=1e-4, atol=1e-4)
    alone, _ = model_call(golden, tokens[:, N:], start_bank(2, N))
    assert np.abs(alone - golden["logits"][:, N:]).max() > 0.1, "the bank matters"


def test_the_released_module_with_top_k(golden):
    weights = reference_weights(of(golden, "topk/weights/"))
    x, bank = (jnp.asarray(golden[f"topk/{name}"]) for name in ("x", "bank"))
    y, new = reference_memory(weights, x, bank, heads=4, top_k=3)
    np.testing.assert_allclose(y, golden["topk/y"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(new, golden["topk/new"], rtol=1e-4, atol=1e-4)
    full, _ = reference_memory(weights, x, bank, heads=4)
    assert np.abs(full - golden["topk/y"]).max() > 0.01, "the largest three are not all"


def test_the_released_module_sees_the_future(golden):
    """Documented, so that nobody takes it for a causal memory: the last token moves the first row."""
    weights = reference_weights(of(golden, "topk/weights/"))
    x, bank = (jnp.asarray(golden[f"topk/{name}"]) for name in ("x", "bank"))
    y, _ = reference_memory(weights, x, bank, heads=4)
    moved, _ = reference_memory(weights, x.at[:, -1].add(1.0), bank, heads=4)
    assert np.abs(moved - y)[:, 0].max() > 1e-3


def test_weights_come_from_a_state_dict_as_safetensors(golden, tmp_path):
    arrays = {name.removeprefix("weights/"): array for name, array in golden.items() if name.startswith("weights/")}
    safetensors.numpy.save_file(arrays, tmp_path / "lm2.safetensors")
    file, prefix = SafetensorsFile(tmp_path / "lm2.safetensors"), f"model.layers.1.{MODULE}."
    found, wanted = reference_weights(file.read, prefix), reference_weights(of(golden, "weights/"), prefix)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    with pytest.raises(UserError, match=r"no parameter 'model\.layers\.2\..*query_proj\.weight'"):
        reference_weights(file.read, f"model.layers.2.{MODULE}.")
    with pytest.raises(ValueError, match="tokens, slots and width must be equal"):
        reference_memory(found, jnp.zeros((2, 8, N)), start_bank(2, N), heads=2)
