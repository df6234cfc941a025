"""A real trained Llama in our decoder: its greedy text, word for word."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm2_jax
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.config import ModelConfig
from lm2_jax.decoder import DecoderConfig
from lm2_jax.memory.none import NoMemory

BOS, STEPS = 1, 256


@pytest.fixture(scope="module")
def folder(data_dir):
    folder = data_dir / "checkpoints" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no checkpoint: {folder} does not exist")
    return folder


def read_llama2c(content: bytes):
    """Config and parameters of a llama2.c file: seven int32, then float32 matrices [out, in], layer by layer."""
    D, F, L, H, G, vocab, _ = struct.unpack("<7i", content[:28])
    K, numbers, taken = D // H, np.frombuffer(content[28:], "<f4"), 0
    assert vocab > 0, "a negative vocabulary means an untied head"

    def take(*shape):
        nonlocal taken
        taken += int(np.prod(shape))
        return numbers[taken - int(np.prod(shape)) : taken].reshape(shape)

    # It rotates the pairs (2i, 2i + 1), we rotate (i, i + K/2): even dimensions first, then odd ones.
    order = [*range(0, K, 2), *range(1, K, 2)]

    def queries(w, heads):
        return w.transpose(0, 2, 1).reshape(L, D, heads, K)[..., order]

    table, attention_norm = take(vocab, D), take(L, D)
    q, k = queries(take(L, H * K, D), H), queries(take(L, G * K, D), G)
    v = take(L, G * K, D).transpose(0, 2, 1).reshape(L, D, G, K)
    o = take(L, D, H * K).transpose(0, 2, 1).reshape(L, H, K, D)
    mlp_norm = take(L, D)
    gated, down, up = (w.transpose(0, 2, 1) for w in (take(L, F, D), take(L, D, F), take(L, F, D)))
    final_norm = take(D)
    params = {
        "embed": {"table": table},
        "final_norm": {"scale": final_norm},
        "blocks_0": {
            "attention_norm": {"scale": attention_norm},
            "attention": {"q_proj": {"w": q}, "k_proj": {"w": k}, "v_proj": {"w": v}, "o_proj": {"w": o}},
            "mlp_norm": {"scale": mlp_norm},
            "mlp": {"gated": {"w": gated}, "up": {"w": up}, "down": {"w": down}},
        },
    }
    decoder = DecoderConfig(width=D, num_layers=L, num_heads=H, num_kv_heads=G, mlp_width=F)
    return vocab, decoder, jax.tree.map(jnp.asarray, params)


def read_words(content: bytes) -> list[bytes]:
    """The pieces of a llama2.c tokenizer: an int32, then per piece a float32 score, a length and the bytes."""
    words, at = [], 4
    while at < len(content):
        _, length = struct.unpack("<fi", content[at : at + 8])
        words.append(content[at + 8 : at + 8 + length])
        at += 8 + length
    return words


def spoken(tokens: list[int], words: list[bytes]) -> str:
    """The text of tokens behind BOS."""
    out, previous = b"", BOS
    for token in tokens:
        word = words[token]
        if word.startswith(b"<0x"):
            word = bytes([int(word[3:5], 16)])
        out += word.removeprefix(b" ") if previous == BOS else word
        previous = token
    return out.decode()


def test_the_greedy_text_of_stories260k(folder):
    quoted = (folder / "stories260K.md").read_text().split("-t 0.0\n")[1].split("\n```")[0]
    vocab, decoder, params = read_llama2c((folder / "stories260K.bin").read_bytes())
    words = read_words((folder / "tok512.bin").read_bytes())
    assert len(words) == vocab
    config = ModelConfig(vocab_size=vocab, segment_tokens=512, decoder=decoder, memory=NoMemory(), join=PlainJoin())
    model = lm2_jax.build_model(config)
    state, token, said = model.init_state(1), BOS, []
    while len(said) < STEPS:
        logits, state = lm2_jax.stream(model, params, np.array([[token]]), state)
        token = int(logits[0, -1].argmax())
        if token == BOS:
            break
        said.append(token)
    assert spoken(said, words).strip() == quoted.strip()

    # The same in one call: each token is the most likely one behind those before it.
    text = np.zeros((1, 512), np.int32)
    text[0, : len(said)] = [BOS, *said[:-1]]
    logits, _ = model.apply({"params": params}, jnp.asarray(text), model.init_state(1))
    np.testing.assert_array_equal(logits[0, : len(said)].argmax(axis=-1), said)
