"""Rows of training text cut from tokenised documents: packed one after another, or read in order."""

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from lm2_jax.data.base import Example
from lm2_jax.data.draws import shuffled
from lm2_jax.errors import UserError


@runtime_checkable  # so that the annotations can be checked in tests
class Documents(Protocol):
    """Tokenised documents with random access."""

    lengths: np.ndarray  # [documents] int64, tokens of each, at least 1
    hashes: np.ndarray  # [documents] uint64, of the content
    eos_id: int
    pad_id: int

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of one document, without a token for its end."""
        ...


def content_hash(tokens: np.ndarray) -> int:
    """Hash of a document's tokens, whatever type they are kept in."""
    return int.from_bytes(hashlib.blake2b(tokens.astype("<u4").tobytes(), digest_size=8).digest(), "little")


class MemoryDocuments:
    """Documents kept in memory, as one array; empty ones are left out."""

    def __init__(self, documents: Iterable[np.ndarray], eos_id: int, pad_id: int):
        kept = [document.astype(np.uint32) for document in documents if len(document)]
        self.lengths = np.array([len(document) for document in kept], np.int64)
        self.hashes = np.array([content_hash(document) for document in kept], np.uint64)
        self.eos_id, self.pad_id = eos_id, pad_id
        self._ends = np.cumsum(self.lengths)
        self._tokens = np.concatenate(kept) if kept else np.zeros(0, np.uint32)

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of one document."""
        end = int(self._ends[index])
        return self._tokens[end - int(self.lengths[index]) : end]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentFields:
    """Fields of every source that is made of documents."""

    packing: Literal["packed", "ordered"] = "packed"
    """"packed": rows are filled with one document after another. "ordered": each row reads a document from step to
    step; with data.carry_state its memory is carried along."""
    document_segments: int | None = None
    """With packing "ordered", longer documents are cut into documents of at most this many segments; None: never."""
    held_out_fraction: float = 0.02
    """Share of the documents, at least one, that training never sees; 0: none, and no evaluation on them."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"source.held_out_fraction must be at least 0 and below 1, got {self.held_out_fraction}")
        if self.document_segments is not None and self.document_segments < 1:
            raise ValueError(f"source.document_segments must be at least 1 or None, got {self.document_segments}")

    @property
    def continues(self) -> bool:
        """Whether a row continues at the next step where it stopped."""
        return self.packing == "ordered"

    @property
    def packs(self) -> bool:
        """Whether a segment can hold several documents."""
        return self.packing == "packed"


class Span(NamedTuple):
    """`count` tokens of a document from its `start`, placed at `position` of a row."""

    document: int
    start: int
    count: int
    position: int
    begins: bool  # whether a new document starts here


class Packed:
    """The documents in a shuffled order, without gaps; row after row takes the next K*T tokens.

    With a constant number of segments every token is read once an epoch. Where the number changes, the reading
    position (step * rows + row) * K * T jumps.
    """

    def __init__(self, lengths: np.ndarray, segment_tokens: int, fields: DocumentFields, seed: int, held_out: bool):
        self._lengths, self._segment_tokens, self._seed = lengths, segment_tokens, seed
        self._total = int(lengths.sum())
        self._lock = threading.Lock()  # one thread sorts, the others wait for its result
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def _make_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = shuffled(len(self._lengths), self._seed, "packed", epoch)
        return order, np.cumsum(self._lengths[order])

    def spans(self, step: int, row: int, rows: int, segments: int) -> list[Span]:
        """The content of the row, without gaps."""
        size = segments * self._segment_tokens
        first, filled, spans = (step * rows + row) * size, 0, []
        while filled < size:
            epoch, offset = divmod(first + filled, self._total)
            with self._lock:
                order, ends = self._order(epoch)
            at = int(np.searchsorted(ends, offset, side="right"))
            while filled < size and at < len(order):
                left = int(ends[at]) - offset
                start = int(self._lengths[order[at]]) - left
                count = min(left, size - filled)
                spans.append(Span(int(order[at]), start, count, filled, begins=start == 0 or filled == 0))
                filled, offset, at = filled + count, offset + count, at + 1
        return spans


class Ordered:
    """Every row has documents of its own and reads them segment by segment and step by step.

    A document starts at a segment border. A row that has read all its documents reads them again in another order.
    Evaluation on fewer documents than rows gives several rows the same document; training refuses that.
    """

    def __init__(self, lengths: np.ndarray, segment_tokens: int, fields: DocumentFields, seed: int, held_out: bool):
        self._segment_tokens, self._seed, self._share = segment_tokens, seed, held_out
        piece_tokens = (fields.document_segments or np.iinfo(np.int64).max // segment_tokens) * segment_tokens
        pieces = -(-lengths // piece_tokens)
        self._document = np.repeat(np.arange(len(lengths)), pieces)
        nth = np.arange(len(self._document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._start = nth * piece_tokens
        self._count = np.minimum(lengths[self._document] - self._start, piece_tokens)
        self._orders: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = {}

    @functools.cached_property
    def _dealt(self) -> np.ndarray:
        return shuffled(len(self._document), self._seed, "deal")

    def _order(self, row: int, rows: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The row's pieces in their order, and the segments read at the end of each."""
        found = self._orders.get((row, rows, epoch))
        if found is None:
            own = self._dealt[row % len(self._dealt) :: rows]
            order = own[shuffled(len(own), self._seed, "ordered", row, epoch)]
            found = order, np.cumsum(-(-self._count[order] // self._segment_tokens))
            self._orders[row, rows, epoch] = found  # not read again here: another thread may be two epochs ahead
            self._orders.pop((row, rows, epoch - 2), None)
        return found

    def spans(self, step: int, row: int, rows: int, segments: int) -> list[Span]:
        """The content of the row: one span per segment."""
        if len(self._dealt) < rows and not self._share:
            raise UserError(
                f"data.source: {len(self._dealt)} training documents for data.rows={rows} rows, but with packing="
                "'ordered' each row needs a document of its own: lower data.rows, cut long documents with "
                "data.source.document_segments, or choose packing='packed'"
            )
        total = int(self._order(row, rows, 0)[1][-1])
        spans = []
        for k in range(segments):
            epoch, offset = divmod(step * segments + k, total)
            order, ends = self._order(row, rows, epoch)
            at = int(np.searchsorted(ends, offset, side="right"))
            piece = order[at]
            read = (offset - (int(ends[at - 1]) if at else 0)) * self._segment_tokens
            count = min(int(self._count[piece]) - read, self._segment_tokens)
            start = int(self._start[piece]) + read
            spans.append(Span(int(self._document[piece]), start, count, k * self._segment_tokens, begins=read == 0))
        return spans


class DocumentSource:
    """A `Source` over documents.

    Args:
      documents: the documents.
      segment_tokens: tokens T of a segment.
      fields: packing and the held-out share.
      seed: chooses every order.
      name: field and value that name the documents, for messages.
    """

    def __init__(self, documents: Documents, segment_tokens: int, fields: DocumentFields, seed: int, name: str):
        self._documents, self._segment_tokens, self._name = documents, segment_tokens, name
        count = len(documents.lengths)
        # By content, so that neither the order of the files nor the seed moves a document from one part to the other.
        by_hash = np.argsort(documents.hashes, kind="stable")
        held_out = _held_out(documents.hashes[by_hash], fields.held_out_fraction)
        if count <= held_out:
            raise UserError(
                f"{name}: {count} documents with text, of which {held_out} would be held out and none left to train "
                "on (equal ones stay together); give more documents or set data.source.held_out_fraction to 0"
            )
        self._parts = {True: np.sort(by_hash[:held_out]), False: np.sort(by_hash[held_out:])}
        self._layouts = {
            part: _LAYOUTS[fields.packing](documents.lengths[members], segment_tokens, fields, seed, part)
            for part, members in self._parts.items()
            if len(members)
        }

    def held_out_documents(self) -> Iterator[np.ndarray]:
        """The tokens of each document that training never reads.

        Raises:
          UserError: nothing is held out.
        """
        if not len(self._parts[True]):
            raise UserError(f"{self._name}: nothing is held out; set data.source.held_out_fraction above 0")
        return (self._documents.tokens(int(index)) for index in self._parts[True])

    def example(self, step: int, row: int, rows: int, segments: int, held_out: bool = False) -> Example:
        """See `Source.example`; all of a document is text to learn from, its end included."""
        if held_out not in self._layouts:
            raise UserError(f"{self._name}: nothing is held out; set data.source.held_out_fraction above 0")
        spans = self._layouts[held_out].spans(step, row, rows, segments)
        example = Example.padding(segments, self._segment_tokens, self._documents.pad_id)
        starts_KT = np.zeros((segments, self._segment_tokens), bool)
        for span in spans:
            document = self._documents.tokens(int(self._parts[held_out][span.document]))
            here = slice(span.position, span.position + span.count)
            following = document[span.start + 1 : span.start + span.count + 1]
            example.tokens[here] = document[span.start : span.start + span.count]
            example.targets[here] = self._documents.eos_id  # stays after the last token of a document
            example.targets[span.position : span.position + len(following)] = following
            example.valid[here] = example.text[here] = True
            segment, within = divmod(span.position, self._segment_tokens)
            if within:
                starts_KT[segment, within] = True
            else:
                example.reset[segment] = span.begins
        example.document[:] = np.cumsum(starts_KT, axis=1, dtype=np.int32).reshape(-1)
        return example


def _held_out(hashes: np.ndarray, fraction: float) -> int:
    """How many of the documents with these hashes, in increasing order, are held out: none that is trained on too."""
    if not fraction or not len(hashes):
        return 0
    wanted = max(1, round(len(hashes) * fraction))
    first, end = (int(np.searchsorted(hashes, hashes[wanted - 1], side)) for side in ("left", "right"))
    return end if first == 0 or (end < len(hashes) and end - wanted <= wanted - first) else first


_LAYOUTS = {"packed": Packed, "ordered": Ordered}
