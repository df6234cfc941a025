"""A real trained Llama in our decoder: its greedy text, word for word."""

import jax.numpy as jnp
import numpy as np
import pytest

import lm2_jax
from lm2_jax.interop.llama2c import read_pieces
from lm2_jax.interop.pretrained import from_pretrained

BOS, STEPS = 1, 256


@pytest.fixture(scope="module")
def folder(data_dir):
    folder = data_dir / "checkpoints" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no checkpoint: {folder} does not exist")
    return folder


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
    pretrained = from_pretrained(folder / "stories260K.bin", segment_tokens=512)
    model, params = pretrained.model, pretrained.params
    words = [piece.text.replace("\u2581", " ").encode() for piece in read_pieces(folder / "tok512.bin", 512)]
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
