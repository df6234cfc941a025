"""Constructors of examples."""

import numpy as np
import pytest

from lm2_jax.data.base import Example


def test_padding_is_a_row_without_text():
    row = Example.padding(2, 3, pad_id=9)
    assert row.tokens.tolist() == row.targets.tolist() == [9] * 6
    for name in ("answer", "text", "valid", "reset"):
        assert not getattr(row, name).any(), name
    assert row.distance.tolist() == [-1] * 6
    assert [array.dtype.name for array in row] == ["int32", "int32", *["bool"] * 4, "int32", "int32"]
    assert row.reset.shape == (2,)


@pytest.mark.parametrize("count", [1, 2, 6, 7])
def test_next_token_predicts_each_following_token(count):
    stream = list(range(1, count + 1))
    row = Example.next_token(stream, 2, 3, pad_id=9)
    for i in range(6):
        assert row.tokens[i] == (stream[i] if i < count else 9)
        assert row.targets[i] == (stream[i + 1] if i + 1 < count else 9)
        assert row.valid[i] == row.text[i] == (i + 1 < count)
    assert row.reset.tolist() == [True, False]


def test_an_answer_is_no_text():
    row = Example.next_token([1, 2, 3, 4], 2, 3, pad_id=9)
    row.mark_answer(1, 2)
    assert np.flatnonzero(row.answer).tolist() == [1, 2]
    assert np.flatnonzero(row.text).tolist() == [0]
    row.mark_answer(4)
    assert row.valid.tolist() == [True, True, True, False, True, False]
