import numpy as np
import pytest

from lm2_jax.data.tokenizers import TokenizerConfig, build_tokenizer
from lm2_jax.inference.texts import AnswerText, token_pieces

STORY = "Mary went to the garden. Zoë took the key — and the naïve café-owner, 東京, 😀 laughed.\n"


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return build_tokenizer(TokenizerConfig(kind=request.param), lambda: [STORY * 20], 512)


@pytest.mark.parametrize("chunk", [1000, 4097, 10**9])
def test_tokens_do_not_depend_on_how_a_text_is_cut_into_chunks(tokenizer, chunk):
    text = STORY * 3000
    chunks = [text[start : start + chunk] for start in range(0, len(text), chunk)]
    pieces = list(token_pieces(tokenizer, chunks))
    assert len(pieces) > 2
    np.testing.assert_array_equal(np.concatenate(pieces), tokenizer.encode(text))


def test_a_text_without_a_place_to_cut_is_encoded_at_once(tokenizer):
    text = "x" * 200_000
    (tokens,) = token_pieces(tokenizer, [text])
    assert tokens.tolist() == tokenizer.encode(text)
    assert list(token_pieces(tokenizer, [])) == []


def test_text_comes_letter_by_letter_and_never_in_halves(tokenizer):
    answer, shown = AnswerText(tokenizer), []
    for token in tokenizer.encode(STORY):
        shown.append(answer.push(token))
    shown.append(answer.finish())
    assert "".join(shown) == answer.text == STORY
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)
    assert sum(map(bool, shown)) > 10


def test_bytes_that_are_no_letter_are_shown_at_the_end(tokenizer):
    ids = tokenizer.encode("aé")[:-1]
    answer = AnswerText(tokenizer)
    shown = [answer.push(token) for token in ids]
    assert "".join(shown) in ("a", "")
    assert "".join([*shown, answer.finish()]) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aaab", ["aab"], "a"),
        ("one two", ["twofold"], "one two"),
        ("one two", [""], "one two"),
    ],
)
def test_stop_strings_end_the_text_before_them_and_no_part_is_shown(tokenizer, text, stop, expected):
    answer, shown = AnswerText(tokenizer, stop), ""
    for token in tokenizer.encode(text):
        shown += answer.push(token)
        assert expected.startswith(shown)
        if answer.is_stopped:
            break
    shown += answer.finish()
    assert shown == answer.text == expected
