"""HMT: the released code's outputs to 1e-4, and both forms token by token in numpy, float64, to 1e-9."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import lm2_jax
from lm2_jax.blocks.recall import RecallJoin
from lm2_jax.blocks.tokens import TokensJoin
from lm2_jax.memory.hierarchical import HierarchicalConfig
from lm2_jax.memory.tokens import TokensConfig
from tests.contract.subjects import ROWS, Subject, assert_close, precise, small
from tests.parity.reference import Past, rms_norm
from tests.parity.test_official import SEGMENT, apply, load, model_of
from tests.parity.test_rows import RowsReference

PUBLISHED = RecallJoin(summary="published")


class HmtReference(RowsReference):
    """Section 3 of arXiv:2405.06067. The cache is a list of all embeddings, of which the last N are seen."""

    def run(self, tokens: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        config, memory = self.config, self.config.memory
        T, k = config.segment_tokens, memory.sensory_tokens
        j = T // 2 if memory.summary_tokens is None else memory.summary_tokens
        p, logits, cache, sensory, query = self.params["carrier"]["memory"], [], [], [], None
        for begin in range(0, len(tokens), T):
            x = list(self.embedded(tokens[begin : begin + T]))
            if config.join.summary == "published":
                query = self.summary(p, x[:j])
            row = self.recalled(p, query, cache[-memory.num_memories :]) if cache else p["start"][0]
            rows = self.decoded([row, *sensory, *x, row])
            logits += [self.head(y) for y in rows[1 + len(sensory) : -1]]
            cache.append(rows[-1])
            if config.join.summary == "before":
                query = self.summary(p, x[T - j :])
            sensory = x[T - k :]
        return np.array(logits), {"cache": cache, "summary": query, "sensory": sensory}

    def summary(self, p: dict[str, Any], x: list[np.ndarray]) -> np.ndarray:
        return self.decoded([p["prompt"][0], *x, p["prompt"][0]])[-1]

    def recalled(self, p: dict[str, Any], query: np.ndarray, cache: list[np.ndarray]) -> np.ndarray:
        q = query @ p["q"]["w"]
        odds = np.exp([q @ (row @ p["k"]["w"]) / np.sqrt(len(q)) for row in cache])
        return sum(share * row for share, row in zip(odds / odds.sum(), cache, strict=True))

    def decoded(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        x = np.array(rows)
        for p in self.layers:
            x, _ = self.block(p, x, 0, Past([], []), None, None)
        scale, epsilon = self.params["final_norm"]["scale"], self.config.decoder.norm_epsilon
        return [rms_norm(row, scale, epsilon) for row in x]


def changed(join: RecallJoin = RecallJoin(), **memory: Any) -> Subject:
    """`hmt_tiny` in float64 with short segments and these fields."""
    config = small("hmt_tiny").config
    return Subject(dataclasses.replace(config, memory=dataclasses.replace(config.memory, **memory), join=join))


@pytest.mark.parametrize(
    ("join", "memory"),
    [
        (RecallJoin(), {}),
        (PUBLISHED, {"num_memories": 3}),
        pytest.param(
            RecallJoin(), {"num_memories": 9, "sensory_tokens": 0, "summary_tokens": 12}, marks=pytest.mark.slow
        ),
        pytest.param(RecallJoin(), {"sensory_tokens": 12, "summary_tokens": 1}, marks=pytest.mark.slow),
    ],
)
def test_hmt_equals_the_reference(join, memory):
    """Six segments, so that the first embeddings are replaced by later ones."""
    case, row = changed(join, **memory), 1
    again = np.roll(case.tokens, 7, axis=1)
    first, state = case.apply(case.tokens)
    second, state = case.apply(again, state)
    tokens = np.concatenate([case.tokens[row], again[row]])
    expected, left = HmtReference(case.config, case.params).run(tokens)
    np.testing.assert_allclose(np.concatenate([first[row], second[row]]), expected, rtol=1e-9, atol=1e-9)
    got, N = jax.tree.map(np.asarray, state.stack), case.config.memory.num_memories
    assert (got.count == 6).all()
    for i, embedding in list(enumerate(left["cache"]))[-N:]:
        np.testing.assert_allclose(got.cache[row, i % N], embedding, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got.summary[row], left["summary"], rtol=1e-9, atol=1e-9)
    if left["sensory"]:
        np.testing.assert_allclose(got.sensory.x[row], left["sensory"], rtol=1e-9, atol=1e-9)


def theirs(golden: Any) -> dict[str, np.ndarray]:
    """Parameters of the memory; their kernels are [out in]."""
    return {
        "carrier/memory/prompt": golden["weights/mem"],
        "carrier/memory/q/w": golden["weights/cross_attn.wq.weight"].T,
        "carrier/memory/k/w": golden["weights/cross_attn.wk.weight"].T,
    }


def test_hmt_equals_the_released_code():
    """Logits of six segments, the last three memory embeddings and the last summary."""
    memory = HierarchicalConfig(num_memories=3, sensory_tokens=2, key_width=4)
    model = model_of(memory, PUBLISHED)
    golden, params = load("hmt", model, "carrier/memory/start", own=theirs)
    logits, state = apply(model, params, golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state.stack.cache, golden["embeddings"][:, 3:], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state.stack.summary, golden["summaries"][:, -1], rtol=1e-4, atol=1e-4)
    causal, _ = apply(model_of(memory, RecallJoin()), params, golden["tokens"])
    np.testing.assert_allclose(causal[:, : 2 * SEGMENT], golden["logits"][:, : 2 * SEGMENT], rtol=1e-4, atol=1e-4)
    assert np.abs(causal - golden["logits"])[:, 2 * SEGMENT :].max() > 0.1, (
        "from the third segment on, the query counts"
    )


def test_one_memory_without_sensory_tokens_is_rmt_with_one_token():
    case = changed(num_memories=1, sensory_tokens=0)
    rmt = Subject(dataclasses.replace(case.config, memory=TokensConfig(num_tokens=1), join=TokensJoin()))
    with precise(case.config):
        start = case.params["carrier"]["memory"]["start"]
    rmt.params = {**case.params, "carrier": {"memory": {"start": start}}}
    (logits, state), (expected, after) = case.apply(case.tokens), rmt.apply(case.tokens)
    assert_close(logits, expected, 1e-12)
    assert_close(state.stack.cache, after.stack.tokens, 1e-12)


@pytest.mark.parametrize(("join", "is_changed"), [(RecallJoin(), False), (PUBLISHED, True)])
def test_only_the_published_form_sees_tokens_before_they_are_predicted(join, is_changed):
    """Token 3 of the third segment, where two embeddings can be recalled, and the two tokens before it."""
    case = changed(join)
    tokens, position = case.tokens.copy(), 2 * case.T + 3
    tokens[:, position] = (tokens[:, position] + 1) % case.config.vocab_size
    before, after = (np.asarray(case.apply(t)[0])[:, position - 2 : position] for t in (case.tokens, tokens))
    assert (before != after).any() == is_changed


def test_the_published_form_is_for_comparison_only():
    run = lm2_jax.preset("hmt_tiny")
    with pytest.raises(ValueError, match=r"set model\.join\.summary='before'"):
        dataclasses.replace(run, model=dataclasses.replace(run.model, join=PUBLISHED))
    case = changed(PUBLISHED)
    with pytest.raises(ValueError, match=r"no text in pieces; set model\.join\.summary='before'"):
        case.stream(case.tokens[:, :5], case.start(ROWS))


def test_rows_in_which_nothing_is_chosen_are_refused():
    run = lm2_jax.preset("hmt_tiny")
    short = dataclasses.replace(run.data, segments=(2,))
    with pytest.raises(ValueError, match=r"no gradient: data\.segments must reach 3"):
        dataclasses.replace(run, data=short)
    memory = dataclasses.replace(run.model.memory, num_memories=1)
    dataclasses.replace(run, data=short, model=dataclasses.replace(run.model, memory=memory))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_memories": 0}, "num_memories must be at least 1"),
        ({"sensory_tokens": -1}, "sensory_tokens must not be negative"),
        ({"sensory_tokens": 13}, r"sensory_tokens=13 .*segment_tokens=12"),
        ({"summary_tokens": 0}, r"summary_tokens=0 must be between 1 and"),
        ({"key_width": 0}, "key_width must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        changed(**fields)
