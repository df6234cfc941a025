"""Text in pieces of any length gives what one call gives."""

import jax
import numpy as np
import pytest

import lm2_jax
from lm2_jax.precision import Precision
from lm2_jax.streaming import advance
from tests.contract.subjects import (
    ROWS,
    TINY,
    VARIANTS,
    Subject,
    assert_close,
    assert_equal,
    changed,
    in_pieces,
    precise,
    quick_compilation,
    small,
    subject,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

__all__ = ["quick_compilation"]


def whole(case: Subject):
    """Logits and state of all segments in one call; by the program that other tests of the model use too."""
    if case.config not in VARIANTS.values() and case.float64:
        return case.apply(case.tokens)
    result = case.run()
    return result.logits, result.state


def fed(case: Subject, lengths: list[int]):
    """Logits and state of the text in pieces of these lengths, then the rest."""
    carry, logits, first = case.start(), [], 0
    for length in [*lengths, case.S - sum(lengths)]:
        piece, carry = case.stream(case.tokens[:, first : first + length], carry)
        assert piece.shape == (ROWS, length, case.config.vocab_size)
        logits.append(piece)
        first += length
    return np.concatenate(logits, axis=1), carry


def check_splits(case: Subject, splits: list[list[int]]) -> None:
    logits, state = whole(case)
    for lengths in splits:
        pieces, carry = fed(case, lengths)
        np.testing.assert_allclose(
            pieces, logits, rtol=case.stream_tolerance, atol=case.stream_tolerance, err_msg=str(lengths)
        )
        assert (np.asarray(carry.position) == 0).all()
        assert_close(carry.state, state, case.stream_tolerance)


@pytest.mark.parametrize("name", in_pieces(TINY))
def test_pieces_equal_one_call(name):
    """In float32, at the preset's own segment: pieces longer than half of it, whole ones, over borders, singles."""
    T = subject(name).T
    check_splits(subject(name), [[T, T], [T - 1], [17, 30, T + 3], [T - 1, 1, 1, T - 1], [T + 20]])


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_short_pieces_equal_one_call(name):
    case = subject(name)
    check_splits(case, [[5] * (case.S // 5), [2, 3, 9, 16], [1] * (case.S - 1)])


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "lm2_tiny" else pytest.mark.slow) for n in TINY])
def test_pieces_are_close_to_one_call_in_bfloat16(name):
    case = changed(name, precision=Precision(compute="bfloat16", state="bfloat16"))
    logits, state = case.apply(case.tokens)
    pieces, carry = fed(case, [case.T - 3, 7])
    assert np.linalg.norm(pieces - logits) < 0.03 * np.linalg.norm(logits)
    assert [leaf.dtype for leaf in jax.tree.leaves(carry.state)] == [leaf.dtype for leaf in jax.tree.leaves(state)]


@pytest.fixture(params=in_pieces([*TINY, *VARIANTS]), scope="module")
def exact(request) -> Subject:
    """Models in float64 with segments of 12: pieces of 1, and of 5 to 12, are the two programs in use."""
    return small(request.param) if request.param in TINY else subject(request.param)


def test_any_split_equals_one_call_in_float64(exact):
    T = exact.T
    check_splits(exact, [[T, T], [7, T + 9], [1] * (T + 2), [T - 1, 1, T, 6]])


def test_a_split_at_every_position_of_a_segment(exact):
    """Only 5 to 12 tokens: shorter pieces go in two."""
    T = exact.T
    check_splits(exact, [[p] if p >= 5 else [1] * p for p in range(1, T)])


def test_rows_of_unequal_length(exact):
    """Each row takes its own prefix of a call, so that rows stand at positions of their own."""
    T = exact.T
    logits, state = whole(exact)
    fed_B, carry = np.zeros(ROWS, int), exact.start()
    plan = [(12, 7, 0), (5, 12, 1), (2, 8, 11), (12, 0, 12), (5, 9, 12)]  # each row's tokens in each call
    for lengths in plan:
        padded = np.zeros((ROWS, T), np.int32)
        for row, length in enumerate(lengths):
            padded[row, :length] = exact.tokens[row, fed_B[row] : fed_B[row] + length]
        valid = np.arange(T)[None] < np.array(lengths)[:, None]
        piece, carry = exact.stream(padded, carry, valid)
        for row, length in enumerate(lengths):
            expected = logits[row, fed_B[row] : fed_B[row] + length]
            np.testing.assert_allclose(
                piece[row, :length], expected, rtol=exact.stream_tolerance, atol=exact.stream_tolerance
            )
            assert (np.asarray(piece)[row, length:] == 0).all()
        fed_B += lengths
        np.testing.assert_array_equal(carry.position, fed_B % T)
    assert list(fed_B) == [36, 36, 36], "the plan feeds every row all its text"
    assert_close(carry.state, state, exact.stream_tolerance)


def test_the_last_logits_alone(exact):
    """`absorb` gives the logits behind the last token of each row, and the same state."""
    logits, _ = whole(exact)
    valid = np.arange(exact.S)[None] < np.array([exact.S, exact.T + 7, 0])[:, None]
    with precise(exact.config):
        last, carry = lm2_jax.absorb(exact.model, exact.params, exact.tokens, exact.start(), valid)
    np.testing.assert_allclose(last[0], logits[0, -1], rtol=exact.stream_tolerance, atol=exact.stream_tolerance)
    np.testing.assert_allclose(
        last[1], logits[1, exact.T + 6], rtol=exact.stream_tolerance, atol=exact.stream_tolerance
    )
    assert (np.asarray(last)[2] == 0).all()
    assert list(np.asarray(carry.position)) == [0, 7, 0]


def test_a_state_can_be_used_again(exact):
    """Neither the state nor the stream that a call was given is consumed by it: a text can branch."""
    T, start = exact.T, exact.start()
    _, carry = exact.stream(exact.tokens[:, :T], start)
    _, carry = exact.stream(exact.tokens[:, T : T + 7], carry)
    first, _ = exact.stream(exact.tokens[:, T + 7 : 2 * T], carry)
    again, _ = exact.stream(exact.tokens[:, T + 7 : 2 * T], carry)
    assert_equal(first, again)
    assert_equal(start, exact.start())


def test_nothing_is_compiled_after_warm_up(exact):
    carry = exact.start()
    for length in (1, 7, 12):
        _, carry = exact.stream(exact.tokens[:, :length], carry)
    programs = advance._cache_size()
    for length in (9, 5, 1, 12, 9 + 12 + 12, 1):
        _, carry = exact.stream(exact.tokens[:, :length], carry)
    assert advance._cache_size() == programs


@pytest.mark.parametrize(
    ("shape", "valid", "message"),
    [
        ((ROWS,), None, r"\[B, S\]"),
        ((ROWS, 0), None, "S >= 1"),
        ((ROWS, 4), np.ones((ROWS, 3), bool), "shape of tokens"),
        ((ROWS, 3), np.array([[True, False, True]] * ROWS), "prefix"),
    ],
)
def test_wrong_input_is_refused(shape, valid, message):
    case = small("none_tiny")
    with pytest.raises(ValueError, match=message):
        case.stream(np.zeros(shape, np.int32), case.start(), valid)
