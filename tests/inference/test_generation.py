import copy
import dataclasses

import jax
import numpy as np
import pytest

import lm2_jax
from lm2_jax import UserError, streaming
from lm2_jax.inference import Engine, Request, Sampling, engine
from tests.contract.subjects import quick_compilation
from tests.inference.subjects import text_of, tiny_run

pytestmark = pytest.mark.usefixtures("quick_compilation")

__all__ = ["quick_compilation"]

# A model has about twenty programs to compile; the lane `long` has all of them.
LANES = {
    "lm2_tiny": (),
    "titans_mac_tiny": pytest.mark.slow,
    "rmt_tiny": pytest.mark.slow,
    "gated_delta_tiny": pytest.mark.slow,
}
TINY = [
    pytest.param(name, marks=LANES.get(name, pytest.mark.long)) for name in lm2_jax.PRESETS if name.endswith("_tiny")
]
# Empty, inside a segment, to a border, over several borders.
PROMPTS = ["", "who?", text_of(31), text_of(32), text_of(33) + "x", text_of(70), "z", text_of(129)]
HOT = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}


def token_ids(run, prompts, memory, rows, **sampling) -> list[list[int]]:
    """The tokens of the answers; many of an untrained model have no text."""
    requests = (
        Request(np.array(run.tokenizer.encode(prompt), np.int32), index, 12, Sampling(**sampling))
        for index, prompt in enumerate(prompts)
    )
    pieces = Engine(run, memory, rows).generate(requests)
    answers = {piece.index: piece.answer.ids for piece in pieces if piece.answer is not None}
    return [answers[index] for index in range(len(prompts))]


def arrays_of(memory) -> list[bytes]:
    leaves = [*jax.tree.leaves(memory.state), memory.logits_V, memory.open_tokens]
    return [np.asarray(leaf).tobytes() for leaf in leaves]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("tokens", [96, 109], ids=["border", "inside"])
def test_a_saved_memory_is_the_uninterrupted_one_bit_for_bit(name, tokens, tmp_path):
    run, text, rest = tiny_run(name), text_of(tokens), text_of(41)
    memory = run.read(text)
    assert (memory.tokens_read, memory.position) == (tokens, tokens % 32)
    memory.save(tmp_path / "m")
    loaded = lm2_jax.load_memory(tmp_path / "m", run)
    assert arrays_of(loaded) == arrays_of(memory)
    assert arrays_of(run.read(rest, loaded)) == arrays_of(run.read(rest, memory))
    # As one text and not two, in pieces of any size.
    pieces = [(text + rest)[start : start + 7] for start in range(0, tokens + len(rest), 7)]
    assert arrays_of(run.read(pieces)) == arrays_of(run.read(rest, loaded)) == arrays_of(run.read(text + rest))

    logits = []
    for before in (memory, loaded):
        start = streaming.open_segment(run.model, run.params, before.state, 1)
        question = np.concatenate([before.open_tokens, run.tokenizer.encode("who?")])[None].astype(np.int32)
        logits.append(np.asarray(lm2_jax.stream(run.model, run.params, question, start)[0]).tobytes())
    assert logits[0] == logits[1]
    answers = run.generate(["", "who?"], memory, max_new_tokens=8)
    assert run.generate(["", "who?"], loaded, max_new_tokens=8) == answers
    assert token_ids(run, ["", "who?"], loaded, 2) == token_ids(run, ["", "who?"], memory, 2)
    if jax.tree.leaves(memory.state):  # else nothing crosses a border
        start = streaming.open_segment(run.model, run.params, run.model.init_state(1), 1)
        forgetful = np.asarray(lm2_jax.stream(run.model, run.params, question, start)[0]).tobytes()
        assert forgetful != logits[0], "the memory has no effect"


@pytest.mark.parametrize("name", TINY)
def test_text_is_the_same_for_any_batch_size_and_without_a_cache(name):
    run = tiny_run(name)
    memory = run.read(text_of(45))
    for options in ({}, HOT):
        answers = token_ids(run, PROMPTS, memory, 3, **options)
        assert all(len(ids) == 12 for ids in answers)
        assert len(set(map(tuple, answers))) > 4
        assert token_ids(run, PROMPTS, memory, 8, **options) == answers
        assert token_ids(run, PROMPTS[:1], memory, 3, **options) == answers[:1]
    # Every token anew from the first one of the text.
    greedy = token_ids(run, PROMPTS, memory, 3)
    for index in (1, 4):
        ids = run.tokenizer.encode(text_of(45) + PROMPTS[index])
        first = len(ids)
        for _ in range(12):
            padded = np.zeros((1, 6 * 32), np.int32)
            padded[0, : len(ids)] = ids
            logits, _ = _one_call(run, padded)
            ids.append(int(np.argmax(logits[0, len(ids) - 1])))
        assert greedy[index] == ids[first:]


def _one_call(run, tokens):
    apply = _APPLY.setdefault(run.config.name, jax.jit(run.model.apply))
    return apply({"params": run.params}, tokens, run.model.init_state(1))


_APPLY = {}


def test_sampling_is_reproducible_by_seed():
    run = tiny_run("lm2_tiny")
    texts = run.generate(["a", "a"], temperature=1.0, seed=3, max_new_tokens=12)
    assert run.generate(["a", "a"], temperature=1.0, seed=3, max_new_tokens=12, batch_size=1) == texts
    assert texts[0] != texts[1], "two prompts that are equal have different draws"
    assert run.generate(["a", "a"], temperature=1.0, seed=4, max_new_tokens=12) != texts


def test_nothing_is_compiled_after_the_first_prompts():
    """From empty caches, as earlier tests may have compiled what the first prompts did not."""
    jax.clear_caches()
    run = tiny_run("lm2_tiny")
    programs = (streaming.advance, streaming.read_segment, streaming.open_rows, engine._put_rows, engine._next_tokens)
    run.generate(PROMPTS, run.read(text_of(70)), max_new_tokens=5, batch_size=3)
    sizes = [program._cache_size() for program in programs]
    run.generate([text_of(n) for n in (1, 300, 64, 65, 5)], run.read(text_of(90)), max_new_tokens=40, batch_size=3)
    run.generate(["a"], max_new_tokens=3, batch_size=3, stop=["b"], **HOT)
    assert [program._cache_size() for program in programs] == sizes


def test_rows_that_end_are_given_the_next_prompts():
    """Three rows answer seven prompts in the steps that the longest three need, not one batch after another."""
    run = tiny_run("lm2_tiny")
    requests = [
        Request(np.array([5 + index], np.int32), index, 24 if index == 0 else 8, Sampling(temperature=1.0))
        for index in range(7)
    ]
    ends = {}
    order = []
    for piece in Engine(run, rows=3).generate(iter(requests)):
        if piece.answer is not None:
            ends[piece.index] = len(piece.answer.ids)
            order.append(piece.index)
    assert sorted(ends) == list(range(7))
    assert order.index(0) > order.index(4), "the first prompt was still being answered when the fifth began"


def test_an_answer_ends_at_a_stop_string_and_at_the_limit():
    run = tiny_run("lm2_tiny")
    (text,) = run.generate("abc", temperature=1.0, max_new_tokens=30)
    stop = text[3:5]
    (cut,) = run.generate("abc", temperature=1.0, max_new_tokens=30, stop=stop)
    assert cut == text[: text.index(stop)]
    (short,) = run.generate("abc", temperature=1.0, max_new_tokens=2)
    assert len(run.tokenizer.encode(short)) <= 6
    assert text.startswith(short[:1])


@pytest.mark.parametrize("name", TINY)
def test_scores_are_log_likelihoods(name):
    run, text, before = tiny_run(name), text_of(70), text_of(45)
    ids = np.array(run.tokenizer.encode(before + text))[None]
    padded = np.pad(ids, [(0, 0), (0, 6 * 32 - ids.shape[1])]).astype(np.int32)
    logits = np.asarray(_one_call(run, padded)[0], np.float64)[0]
    log_p = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    each = log_p[np.arange(ids.shape[1] - 1), ids[0, 1:]]
    with_memory = run.score([text, "b", text[:7]], run.read(before))
    np.testing.assert_allclose(with_memory[0], each[44:].sum(), rtol=1e-4)
    np.testing.assert_allclose(with_memory[2], each[44:51].sum(), rtol=1e-4)
    np.testing.assert_allclose(run.score(before + text), [each.sum()], rtol=1e-4)


def test_an_answer_ends_with_the_document():
    run = tiny_run("lm2_tiny")
    (ids,) = token_ids(run, ["abc"], None, 1, temperature=1.0)
    tokenizer = copy.copy(run.tokenizer)
    tokenizer.eos_id = ids[5]
    (short,) = token_ids(run._replace(tokenizer=tokenizer), ["abc"], None, 1, temperature=1.0)
    assert short == ids[: ids.index(ids[5])]


def test_an_empty_prompt_needs_a_memory():
    run = tiny_run("lm2_tiny")
    with pytest.raises(UserError, match="prompt 1 is empty"):
        run.generate(["a", ""])
    with pytest.raises(UserError, match=r"texts \[0\] are empty"):
        run.score([""])
    assert run.generate([]) == []
    with pytest.raises(UserError, match="max_new_tokens=0"):
        run.generate("a", max_new_tokens=0)


def test_a_memory_of_another_model_is_refused():
    run = tiny_run("lm2_tiny")
    memory = run.read("abc")
    other = tiny_run("lm2_tiny", seed=1)
    for use in (lambda: other.generate("a", memory), lambda: other.read("a", memory), lambda: other.score("a", memory)):
        with pytest.raises(UserError, match="another model"):
            use()
    equal = run._replace(params=jax.tree.map(lambda x: x + 0, run.params))
    assert equal.generate("a", memory, max_new_tokens=2) == run.generate("a", memory, max_new_tokens=2)


def test_reading_leaves_the_memory_before_as_it_was():
    run = tiny_run("lm2_tiny")
    memory = run.read(text_of(40))
    before = arrays_of(memory)
    run.read(text_of(100), memory)
    run.generate("abc", memory, max_new_tokens=4)
    assert arrays_of(memory) == before
    assert [dataclasses.astuple(source)[2:4] for source in memory.sources] == [(40, True)]
