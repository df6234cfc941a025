"""Text of any length into a memory, at constant cost per token and in constant space."""

import codecs
import dataclasses
import datetime
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np
from etils import epath

from lm2_jax import streaming
from lm2_jax.errors import UserError
from lm2_jax.inference.snapshot import MemorySnapshot, Source, empty_memory
from lm2_jax.inference.texts import token_pieces
from lm2_jax.length import check_segments

if TYPE_CHECKING:
    from lm2_jax.runs import Run

_CHUNK_BYTES = 1 << 16
Report = Callable[[MemorySnapshot], None]
"""Called with the memory at a segment border."""


class Reader:
    """One row that takes tokens, segment by segment.

    Args:
      memory: what it begins with.
    """

    def __init__(self, memory: MemorySnapshot):
        self._memory = memory

    @property
    def memory(self) -> MemorySnapshot:
        """What is remembered so far."""
        return self._memory

    def begin(self, source: Source) -> None:
        """A new text begins."""
        self._memory = dataclasses.replace(self._memory, sources=(*self._memory.sources, source))

    def end(self, **changes: object) -> None:
        """The text that was begun ends; `changes` are fields of its `Source`."""
        *before, last = self._memory.sources
        last = dataclasses.replace(last, is_complete=True, **changes)
        self._memory = dataclasses.replace(self._memory, sources=(*before, last))

    def feed(self, tokens: np.ndarray, at_border: Report = lambda memory: None) -> None:
        """Reads tokens of the text that was begun; `at_border` is called after each segment."""
        T, start = self._memory.run.config.model.segment_tokens, 0
        while start < len(tokens):
            taken = tokens[start : start + T - self._memory.position]
            start += len(taken)
            self._take(taken, T)
            if self._memory.position == 0:
                at_border(self._memory)

    def _take(self, taken: np.ndarray, T: int) -> None:
        memory, run = self._memory, self._memory.run
        *before, last = memory.sources
        last = dataclasses.replace(last, tokens=last.tokens + len(taken))
        open_tokens = np.concatenate([memory.open_tokens, taken.astype(np.int32)])
        state, logits_V = memory.state, memory.logits_V
        if len(open_tokens) == T:
            is_fed_B = np.ones(1, bool)
            check_segments(run.config.model, state, (1, T))
            logits_BV, state = streaming.read_segment(run.model, run.params, state, open_tokens[None], is_fed_B)
            logits_V, open_tokens = logits_BV[0], open_tokens[:0]
        # Replaced at once, so that an interrupt leaves a memory that is consistent.
        self._memory = dataclasses.replace(
            memory,
            state=state,
            logits_V=logits_V,
            open_tokens=open_tokens,
            tokens_read=memory.tokens_read + len(taken),
            sources=(*before, last),
        )


def read(run: "Run", text: str | Iterable[str], memory: MemorySnapshot | None = None) -> MemorySnapshot:
    """Reads a text of any length; device and host hold one segment and the state, never the text.

    Args:
      run: a trained run.
      text: the text, or an iterable of pieces of it, cut anywhere.
      memory: what was read before; None: nothing.
    Returns:
      The memory after the text; the one before stays as it was.
    Raises:
      UserError: the memory is one of another model or tokenizer.
    """
    reader, digest = Reader(_continued(run, memory)), hashlib.sha256()

    def hashed() -> Iterator[str]:
        for chunk in [text] if isinstance(text, str) else text:
            digest.update(chunk.encode("utf-8", "surrogatepass"))
            yield chunk

    reader.begin(Source("text", None, 0, False))
    for tokens in token_pieces(run.tokenizer, hashed()):
        reader.feed(tokens)
    reader.end(sha256=digest.hexdigest())
    return reader.memory


def _continued(run: "Run", memory: MemorySnapshot | None) -> MemorySnapshot:
    if memory is None:
        return empty_memory(run)
    memory.check_run(run)
    return dataclasses.replace(memory, run=run)


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of UTF-8 text, checked from its first byte to its last."""

    path: epath.Path
    size: int
    sha256: str
    modified: str
    flag: str = "--read"  # what the user calls it, for messages

    @classmethod
    def open(cls, path: epath.PathLike, flag: str = "--read") -> "TextFile":
        """Reads the file once to check it.

        Raises:
          UserError: no such file, an empty one, a folder, or one that is not UTF-8 text.
        """
        file = epath.Path(path)
        try:
            if file.is_dir():
                raise UserError(f"{flag} {path}: expected a text file, this is a folder; name its files")
            if not file.exists():
                raise UserError(f"{flag} {path}: no such file")
            if not file.is_file():
                raise UserError(f"{flag} {path}: expected a file, which can be read twice; this is a device or a pipe")
            digest, size = hashlib.sha256(), 0
            for raw, _ in _decoded(file, flag):
                digest.update(raw)
                size += len(raw)
            mtime = file.stat().mtime
        except OSError as error:
            raise UserError(f"{flag} {path}: cannot be read: {error}", status=1) from error
        if not size:
            raise UserError(f"{flag} {path}: the file is empty; expected text")
        modified = datetime.datetime.fromtimestamp(int(mtime), datetime.UTC).isoformat()
        return cls(file, size, digest.hexdigest(), modified, flag)

    def chunks(self, at_byte: Callable[[int], None] = lambda byte: None) -> Iterator[str]:
        """The text in chunks; `at_byte` is called with the bytes read so far.

        Raises:
          UserError: the file was changed since it was checked.
        """
        digest, size = hashlib.sha256(), 0
        try:
            for raw, text in _decoded(self.path, self.flag):
                digest.update(raw)
                size += len(raw)
                at_byte(size)
                yield text
        except OSError as error:
            raise UserError(f"{self.flag} {self.path}: cannot be read: {error}", status=1) from error
        if digest.hexdigest() != self.sha256:
            raise UserError(f"{self.flag} {self.path}: the file was changed while it was read; read it again", status=1)

    @property
    def source(self) -> Source:
        """The entry of this file in a memory, before it is read."""
        return Source(self.path.name, self.sha256, 0, False, self.modified)


def _decoded(path: epath.Path, flag: str) -> Iterator[tuple[bytes, str]]:
    """The bytes of a file and their text, chunk by chunk; a mark of the byte order is left out."""
    decoder, start = codecs.getincrementaldecoder("utf-8-sig")(), 0
    with path.open("rb") as file:
        while True:
            raw = file.read(_CHUNK_BYTES)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{flag} {path}: expected UTF-8 text, but near byte {start + error.start:,} it is none "
                    f"({error.reason}); convert the file to UTF-8 or choose another"
                ) from error
            if "\0" in text:
                raise UserError(f"{flag} {path}: expected text, but it contains zero bytes; it is a binary file")
            start += len(raw)
            if not raw:
                if text:
                    yield raw, text
                return
            yield raw, text


def read_files(
    memory: MemorySnapshot,
    files: Iterable[TextFile],
    at_border: Report = lambda memory: None,
    at_byte: Callable[[int], None] = lambda byte: None,
) -> MemorySnapshot:
    """Reads files one after another; a file that the memory has read in part is resumed.

    Args:
      memory: what was read before. If its last source is incomplete, the first file must be that one.
      files: the files.
      at_border: called at each segment border with the memory there.
      at_byte: called with the bytes of all files so far.
    Returns:
      The memory after the last file.
    Raises:
      UserError: the memory holds a part of another file.
    """
    reader, before = Reader(memory), 0
    for file in files:
        skipped = 0
        if memory.sources and not reader.memory.sources[-1].is_complete:
            partial = reader.memory.sources[-1]
            if partial.sha256 != file.sha256:
                raise UserError(
                    f"the memory holds the first {partial.tokens:,} tokens of {partial.name!r}, unfinished: read that "
                    "file first, with --read"
                )
            skipped = partial.tokens
        else:
            reader.begin(file.source)
        chunks = file.chunks(lambda byte, before=before: at_byte(before + byte))
        for tokens in token_pieces(memory.run.tokenizer, chunks):
            ignored = min(skipped, len(tokens))
            skipped -= ignored
            reader.feed(tokens[ignored:], at_border)
        reader.end()
        before += file.size
    jax.block_until_ready(reader.memory.state)
    return reader.memory
