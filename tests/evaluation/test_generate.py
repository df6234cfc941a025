"""Greedy answers, against a toy model whose every answer depends on every token it has read."""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm2_jax
from lm2_jax.evaluation.answerer import PIECE_SEGMENTS, Prompt, RunAnswerer, even_batches
from lm2_jax.runs import Run

VOCAB, PAD, EOS, SEGMENT = 13, 11, 12, 4
PRIME = 10_007
PARAMS = {"p": jnp.ones(())}


class Hash(NamedTuple):
    """What the toy remembers: a hash of all tokens in order, and how many."""

    hash_B: jax.Array
    count_B: jax.Array


class Letters:
    """Tokenizer of the toy: token i is the i-th letter."""

    vocab_size, pad_id, eos_id, answer_id = VOCAB, PAD, EOS, None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


def step(value, token):
    return (value * 31 + token + 1) % PRIME


@jax.jit
def feed(tokens_BS, state, valid_BS):
    value_B, _ = jax.lax.scan(
        lambda value_B, inputs: (jnp.where(inputs[1], step(value_B, inputs[0]), value_B), None),
        state.hash_B,
        (tokens_BS.T, valid_BS.T),
    )
    logits_BV = jax.nn.one_hot(value_B % VOCAB, VOCAB)
    # Rows that read nothing have no last token: their logits must not be used.
    logits_BV = jnp.where(valid_BS.any(1)[:, None], logits_BV, jnp.nan)
    return logits_BV, Hash(value_B, state.count_B + valid_BS.sum(1, dtype=jnp.int32))


class Toy:
    """Stands in for `lm2_jax.streaming.absorb`, checks its promises and counts the shapes it would compile."""

    def __init__(self):
        self.config = SimpleNamespace(segment_tokens=SEGMENT)
        self.shapes = set()
        self.fed = 0

    def init_state(self, batch):
        return Hash(jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))

    def absorb(self, model, params, tokens_BS, state, valid_BS):
        assert model is self
        assert list(params) == ["p"]
        self.shapes.add(tokens_BS.shape)
        self.fed += int(np.asarray(valid_BS).sum())
        valid, inside = np.asarray(valid_BS), np.asarray(state.count_B) % SEGMENT
        assert not (valid[:, 1:] & ~valid[:, :-1]).any(), "valid must be a prefix"
        assert tokens_BS.shape[1] == 1 or not (valid.any(1) & (inside != 0)).any(), "a piece begins a segment"
        return feed(tokens_BS, state, valid_BS)


def answer(prompt, most):
    """The toy's answer, worked out in plain Python."""
    value, letters = 0, []
    for token in prompt:
        value = step(value, token)
    while len(letters) < most and value % VOCAB != EOS:
        letters.append(value % VOCAB)
        value = step(value, value % VOCAB)
    return Letters().decode(letters)


def ask(prompts, max_new_tokens, batch_rows=32):
    toy = Toy()
    run = Run(lm2_jax.preset("lm2_tiny"), toy, PARAMS, Letters(), 0)
    answerer = RunAnswerer(run, absorb=toy.absorb)
    answers = [None] * len(prompts)
    batches = even_batches([len(prompt) for prompt in prompts], batch_rows)
    for batch in batches:
        chosen = [Prompt(Letters(), Letters().decode(prompts[index])) for index in batch]
        given = answerer.answer(chosen, max_new_tokens, rows=len(batches[0]))
        for index, text in zip(batch, given, strict=True):
            answers[index] = text
    return answers, toy


@pytest.fixture(scope="module")
def prompts():
    draw = np.random.default_rng(0)
    lengths = [1, 3, 4, 5, 8, 31, 32, 33, 36, 40, 70, 97, 2, 64, 65]
    return [draw.integers(0, VOCAB, length).tolist() for length in lengths]


@pytest.mark.parametrize("rows", [1, 2, 4, 15, 64])
def test_answers_do_not_depend_on_the_batch(prompts, rows):
    answers, _ = ask(prompts, max_new_tokens=20, batch_rows=rows)
    assert answers == [answer(prompt, 20) for prompt in prompts]
    assert len({len(text) for text in answers}) > 5  # rows end at different places, so the test tests something


def test_most_tokens(prompts):
    answers, _ = ask(prompts, max_new_tokens=3)
    assert answers == [answer(prompt, 3) for prompt in prompts]
    assert max(map(len, answers)) == 3


def test_nothing_recompiles_and_pieces_stay_small(prompts):
    """One shape for long pieces, one for segments, one for answers, whatever comes; none holds a prompt."""
    large = PIECE_SEGMENTS * SEGMENT
    long = [list(range(10)) * 50, list(range(10)) * 33]
    _, toy = ask(prompts + long, max_new_tokens=5, batch_rows=6)
    assert toy.shapes == {(6, large), (6, SEGMENT), (6, 1)}


def test_ends_when_all_rows_have_ended():
    """No token is fed after an end, nor after the last that is asked for."""
    short = next([first] for first in range(VOCAB) if answer([first], 1) == "")
    answers, toy = ask([short, short], max_new_tokens=9)
    assert answers == ["", ""]
    assert toy.fed == 2
    text = answer([1, 2, 3], 4)
    assert len(text) == 4
    answers, toy = ask([[1, 2, 3]], max_new_tokens=4)
    assert answers == [text]
    assert toy.fed == 3 + 3


def test_bad_arguments():
    assert ask([], max_new_tokens=1)[0] == []
    with pytest.raises(ValueError, match=r"prompts \[0\] are empty"):
        ask([[1], []], max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        ask([[1]], max_new_tokens=0)


def test_even_batches():
    assert even_batches([5, 1, 4, 2, 3], 2) == [[1, 3], [4, 2], [0]]
    assert [len(batch) for batch in even_batches(range(100), 32)] == [25] * 4
    assert even_batches([], 3) == []
