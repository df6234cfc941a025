"""Text of single tokens, and the loss of sentences."""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm2_jax.data.base import Tokenizer
from lm2_jax.inference.texts import AnswerText

LEAST_TOKENS = 4  # of a sentence that is ranked
_ENDS = re.compile(r"[.!?]+[\"'”’)\]]*\s+|\n\s*\n")


class Sentence(NamedTuple):
    """A sentence and how much it surprised."""

    text: str
    first: int  # token
    tokens: int
    loss: float  # mean over its tokens, in nats


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray) -> list[str]:
    """The text of each token; a letter that several tokens make up belongs to the last of them."""
    text = AnswerText(tokenizer)
    pieces = [text.push(int(token)) for token in tokens]
    if pieces:
        pieces[-1] += text.finish()
    return pieces


def rank_sentences(texts: Sequence[str], losses: np.ndarray) -> list[Sentence]:
    """The sentences of a text, the one with the highest mean loss first.

    Args:
      texts: of each token.
      losses: of each token; NaN where there was no prediction.
    """
    ends = np.cumsum([len(text) for text in texts])
    full = "".join(texts)
    borders = [0, *(match.end() for match in _ENDS.finditer(full)), len(full)]
    sentences = []
    for start, end in itertools.pairwise(borders):
        # A token belongs to the sentence in which it ends.
        first, last = np.searchsorted(ends, start, "right"), np.searchsorted(ends, end, "right")
        known = losses[first:last][np.isfinite(losses[first:last])]
        text = " ".join(full[start:end].split())
        if len(known) >= LEAST_TOKENS and text:
            sentences.append(Sentence(text, int(first), int(last - first), float(known.mean())))
    return sorted(sentences, key=lambda sentence: -sentence.loss)
