"""Between text and tokens, piece by piece: tokens of a text of any length, and text of tokens as they come."""

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lm2_jax.data.base import Tokenizer

_PIECE = 1 << 16  # characters encoded in one call
_AROUND = 256  # characters on each side of a cut that are encoded to try it
# Before a blank and a letter; after a line, or a sentence without blanks.
_CUTS = re.compile(r"(?<=[A-Za-z0-9.,;:!?)])(?= [A-Za-z])|(?<=\n)(?=[A-Za-z])|(?<=[。！？])(?=\w)")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # the text of a token that ends inside a letter


def token_pieces(tokenizer: Tokenizer, chunks: Iterable[str]) -> Iterator[np.ndarray]:
    """The tokens of a text that arrives in chunks, in bounded memory.

    Where the text is cut depends on the text alone and not on the chunks. A cut is made only where the tokens on both
    sides stay the same; a text without such a place is encoded in one call.

    Args:
      tokenizer: the tokenizer.
      chunks: the text, cut anywhere.
    Yields:
      [n] int32, at least one token each.
    """
    text, tried = "", _PIECE // 2
    waiting: list[str] = []
    for chunk in chunks:
        waiting.append(chunk)
        if len(text) + sum(map(len, waiting)) < _PIECE + _AROUND:
            continue
        text, waiting = "".join([text, *waiting]), []
        while len(text) >= _PIECE + _AROUND:
            cut, tried = _first_cut(tokenizer, text, tried)
            if cut is None:
                break
            yield from _tokens(tokenizer, text[:cut])
            text, tried = text[cut:], _PIECE // 2
    yield from _tokens(tokenizer, "".join([text, *waiting]))


def _tokens(tokenizer: Tokenizer, text: str) -> Iterator[np.ndarray]:
    ids = np.array(tokenizer.encode(text), np.int32)
    if len(ids):
        yield ids


def _first_cut(tokenizer: Tokenizer, text: str, start: int) -> tuple[int | None, int]:
    """The first place from `start` on where the text may be cut; or None, and where to try next."""
    end = len(text) - _AROUND
    for match in _CUTS.finditer(text, start):
        at = match.start()
        if at >= end:
            return None, at
        before, after = text[at - _AROUND : at], text[at : at + _AROUND]
        if tokenizer.encode(before + after) == [*tokenizer.encode(before), *tokenizer.encode(after)]:
            return at, at
    return None, max(start, end)


class AnswerText:
    """The text of an answer while its tokens arrive.

    Args:
      tokenizer: the tokenizer.
      stop: strings that end the answer; the text ends before the first of them.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._ids: list[int] = []
        self._first, self._shown = 0, 0  # tokens that are decoded again, and those of them whose text is known
        self._text, self._released = "", 0
        self.is_stopped = False

    @property
    def ids(self) -> list[int]:
        """The tokens so far."""
        return self._ids

    @property
    def text(self) -> str:
        """The text that may be shown so far."""
        return self._text[: self._released]

    def push(self, token: int) -> str:
        """Adds a token; returns the text that may be shown now.

        Bytes of an unfinished letter are held back, and text that may be the beginning of a stop string.
        """
        self._ids.append(token)
        known = self._tokenizer.decode(self._ids[self._first : self._shown])
        now = self._tokenizer.decode(self._ids[self._first :])
        if len(now) > len(known) and not now.endswith(_UNFINISHED):
            self._first, self._shown = self._shown, len(self._ids)
            self._add(now[len(known) :])
        return self._release(len(self._text) - self._held_back())

    def finish(self) -> str:
        """Ends the answer; returns the rest of its text."""
        if not self.is_stopped:
            known = self._tokenizer.decode(self._ids[self._first : self._shown])
            self._add(self._tokenizer.decode(self._ids[self._first :])[len(known) :])
        return self._release(len(self._text))

    def _add(self, piece: str) -> None:
        longest = max(map(len, self._stop), default=0)
        start = max(0, len(self._text) - longest)
        self._text += piece
        found = [at for stop in self._stop if (at := self._text.find(stop, start)) >= 0]
        if found:
            self._text, self.is_stopped = self._text[: min(found)], True

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        if self.is_stopped:
            return 0
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n]))
        return max(lengths, default=0)

    def _release(self, end: int) -> str:
        start, self._released = self._released, max(self._released, end)
        return self._text[start : self._released]
