"""How text of a row becomes tokens: one sentence at a time, with a leading blank, remembered."""

from collections.abc import Iterator

from lm2_jax.data.background import Background
from lm2_jax.data.base import Tokenizer
from lm2_jax.data.philox import Draws
from lm2_jax.errors import UserError

MARKER_TEXT = " Answer:"  # stands after a question where the vocabulary has no marker
_REMEMBERED = 100_000


class Encoder:
    """Encodes sentences, each with a leading blank, and remembers what it encoded.

    Args:
      tokenizer: the tokenizer; `eos` and `marker` are taken from it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        answer_id = tokenizer.answer_id
        self.marker = [answer_id] if answer_id is not None else tokenizer.encode(MARKER_TEXT)
        self.eos_id, self.pad_id = tokenizer.eos_id, tokenizer.pad_id

    def __call__(self, sentence: str) -> list[int]:
        """Tokens of one sentence; the list is shared, so it must not be changed."""
        ids = self._known.get(sentence)
        if ids is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            ids = self._known[sentence] = self._tokenizer.encode(" " + sentence.strip())
        return ids

    def question(self, question: str) -> list[int]:
        """Tokens of a question and the marker after it: what stands before an answer."""
        return self(question) + self.marker


def noise(
    background: Background, encode: Encoder, draws: Draws, held_out: bool, min_tokens: int
) -> Iterator[tuple[str, list[int]]]:
    """Consecutive background sentences of at least `min_tokens` tokens, with their tokens; without end."""
    short = 0
    for sentence in background.sentences(draws, held_out):
        ids = encode(sentence)
        if len(ids) >= min_tokens:
            short = 0
            yield sentence, ids
            continue
        short += 1
        if short == 10_000:
            raise UserError(
                f"min_sentence_tokens={min_tokens}: 10000 background sentences in a row were shorter; lower it "
                "or change books_dir",
                status=1,
            )
