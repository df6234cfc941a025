"""Background text that hides the facts: consecutive sentences of books, or generated prose.

Books are drawn as BABILong does (booydar/babilong): a random book, a random place in it, and the first and last
pieces dropped because they may be incomplete. Held-out text is the last tenth of every book, or paragraphs of the
generated prose that training never reads.
"""

import codecs
import functools
import itertools
import mmap
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Protocol

from lm2_jax.data import prose
from lm2_jax.data.files import check_regular, decode
from lm2_jax.data.philox import Draws
from lm2_jax.errors import UserError

HELD_OUT_PART = 0.1  # of every book, at its end
_WINDOW = 4096  # bytes read at once
_CHECKED = 1 << 16  # bytes at the start of each book whose encoding is checked when the folder is opened
_CHECKED_BOOKS = 1000
_PARAGRAPHS = 16_384  # of generated prose for training; as many again are held out
_LONGEST = 16_384  # characters of a sentence; beyond that a text has no full stops
_END = re.compile(r"[.!?]+[\"'”’“)\]_]*(?=\s+[\"'“‘„(\[_]*(\w))|\n\s*\n")
_LAST_WORD = re.compile(r"([\w.]+)\.$")
_ABBREVIATIONS = frozenset(
    "mr mrs messrs mme ms dr st sr jr rev hon gen col capt lieut sergt prof esq vol vols no nos fig figs ch chap p pp "
    "ed i.e e.g viz cf etc vs op ibid sec jan feb aug sept oct nov dec".split()
)


class Background(Protocol):
    """Where background sentences come from."""

    def sentences(self, draws: Draws, held_out: bool) -> Iterator[str]:
        """Consecutive sentences from a random place; without end.

        Args:
          draws: chooses the place, and the next one when the text there ends.
          held_out: text that training never reads.
        """
        ...


class Prose:
    """The generated prose of `lm2_jax.data.prose`."""

    def sentences(self, draws: Draws, held_out: bool) -> Iterator[str]:
        first = _PARAGRAPHS if held_out else 0
        number = draws.below(_PARAGRAPHS)
        skip = draws.below(prose.SENTENCES)
        while True:
            yield from prose.paragraph(first + number % _PARAGRAPHS)[skip:]
            number, skip = number + 1, 0


def split_sentences(text: str) -> tuple[list[str], str]:
    """Cuts running text into sentences.

    A sentence ends at a full stop, an exclamation or a question mark before a capital letter or a digit, and at an
    empty line; not after an abbreviation or an initial.

    Args:
      text: any text; line breaks count as blanks.
    Returns:
      The complete sentences with blanks normalised, and the rest of the text unchanged.
    """
    sentences, start = [], 0
    for match in _END.finditer(text):
        if match[1] is not None and not (match[1].isupper() or match[1].isdigit()):
            continue
        piece = text[start : match.end()]
        word = _LAST_WORD.search(piece)
        if word and (word[1].lower() in _ABBREVIATIONS or (len(word[1]) == 1 and word[1].isupper() and word[1] != "I")):
            continue
        start = match.end()
        sentence = " ".join(piece.split())
        if sentence:
            sentences.append(sentence)
    return sentences, text[start:]


class Books:
    """A folder of plain-text books, UTF-8, one per `.txt` file.

    The files are memory-mapped: opening is instant, and only what is read takes memory. The encoding is checked at the
    start of each book (of the first thousand); a damaged character further on is read as U+FFFD.

    Args:
      folder: the folder.
    Raises:
      UserError: if it is no folder, holds no text, or a book is no regular file or not UTF-8.
    """

    def __init__(self, folder: str):
        root = pathlib.Path(os.path.expanduser(folder))
        if not root.is_dir():
            raise UserError(f"books_dir: expected a folder of .txt books, got {folder!r}, which is not a folder")
        self._folder = folder
        found = [path for path in sorted(root.glob("*.txt")) if not path.is_dir()]
        for path in found:
            check_regular(path)
        self._paths = [path for path in found if path.stat().st_size > 0]
        for path in itertools.islice(self._paths, _CHECKED_BOOKS):
            _check_encoding(path)
        if not self._paths:
            raise UserError(f"books_dir: expected .txt books in {folder!r}, found none; change books_dir")

    def sentences(self, draws: Draws, held_out: bool) -> Iterator[str]:
        fruitless = 0
        while True:
            found = False
            for sentence in self._run(draws, held_out):
                found = True
                yield sentence
            fruitless = 0 if found else fruitless + 1
            if fruitless == 100:
                raise UserError(
                    f"books_dir: 100 places in the books of {self._folder!r} held no complete sentence; "
                    "expected running text with full stops, some thousand characters a book",
                    status=1,
                )

    def _run(self, draws: Draws, held_out: bool) -> Iterator[str]:
        """The sentences from a random place to the end of that book's part."""
        content = _map_file(draws.choice(self._paths))
        border = int(len(content) * (1 - HELD_OUT_PART))
        low, high = (border, len(content)) if held_out else (0, border)
        at = low + draws.below(max(1, high - low))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        rest, first = "", True
        while at < high and content[at] & 0xC0 == 0x80:  # the place is inside a character
            at += 1
        while at < high:
            raw = content[at : min(at + _WINDOW, high)]
            raw = raw.removeprefix(codecs.BOM_UTF8) if at == 0 else raw
            at = min(at + _WINDOW, high)
            complete, rest = split_sentences(rest + decoder.decode(raw))
            if first and complete:
                complete, first = complete[1:], False
            yield from complete
            if len(rest) > _LONGEST:
                rest, first = "", True


def _check_encoding(path: pathlib.Path) -> None:
    with path.open("rb") as file:
        start = file.read(_CHECKED)
    if len(start) == _CHECKED:
        start = start.rstrip(bytes(range(0x80, 0x100)))  # the last character may be incomplete
    decode(start, str(path))


@functools.lru_cache(maxsize=256)  # a mapped file keeps a descriptor open; there may be thousands of books
def _map_file(path: pathlib.Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def open_background(books_dir: str | None) -> Background:
    """Books where a folder is given, else generated prose."""
    return Prose() if books_dir is None else Books(books_dir)
