"""Encodes the text of a row, one sentence at a time with a leading blank, with a cache."""

from collections.abc import Callable, Iterator

from lm2_jax.data.background import Background
from lm2_jax.data.base import Tokenizer
from lm2_jax.data.philox import Draws
from lm2_jax.errors import UserError

MARKER_TEXT = " Answer:"  # follows a question where the vocabulary has no marker
_CACHED_SENTENCES = 100_000
Noise = Callable[[Draws, bool], Iterator[tuple[str, list[int]]]]  # `noise` with all but draws and held_out given


class Encoder:
    """Encodes sentences, each with a leading blank, and caches the result.

    Args:
      tokenizer: the tokenizer.
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
            if len(self._known) >= _CACHED_SENTENCES:
                self._known.clear()
            ids = self._known[sentence] = self._tokenizer.encode(" " + sentence.strip())
        return ids

    def cut(self, ids: list[int], size: int) -> str:
        """The text of the first `size` tokens."""
        return self._tokenizer.decode(ids[:size]).strip()

    def question(self, question: str) -> list[int]:
        """Tokens of a question and the marker after it, which precede an answer."""
        return self(question) + self.marker


def noise(
    background: Background, encode: Encoder, draws: Draws, held_out: bool, bounds: tuple[int, int | None]
) -> Iterator[tuple[str, list[int]]]:
    """Consecutive background sentences with their tokens; without end.

    Args:
      background: where they come from.
      encode: the encoder.
      draws: chooses the place.
      held_out: text that training never reads.
      bounds: fewest and most tokens of a sentence, None for no limit; others are left out.
    Raises:
      UserError: if the background has no such sentences.
    """
    least, most = bounds
    skipped = 0
    for sentence in background.sentences(draws, held_out):
        ids = encode(sentence)
        if len(ids) >= least and (most is None or len(ids) <= most):
            skipped = 0
            yield sentence, ids
            continue
        skipped += 1
        if skipped == 10_000:
            raise UserError(
                f"data.source: of 10000 background sentences in a row none had {least} to {most or 'any number of'} "
                "tokens; change min_sentence_tokens, max_sentence_tokens or books_dir",
                status=1,
            )
