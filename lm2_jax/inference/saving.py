"""Reading files into a memory file: saved every so many tokens, resumed where it stopped, with progress on stderr."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
from etils import epath

from lm2_jax import atomic, memory_file
from lm2_jax.errors import UserError
from lm2_jax.inference.reading import TextFile, read_files
from lm2_jax.inference.snapshot import MemorySnapshot, empty_memory, model_fingerprint

if TYPE_CHECKING:
    from lm2_jax.runs import Run


class ReadProgress:
    """A line on the standard error that is written again on a terminal; elsewhere a line every ten seconds.

    Args:
      total_bytes: of all files.
      tokens_before: read before.
    """

    def __init__(self, total_bytes: int, tokens_before: int = 0):
        self._out = sys.stderr
        self._total, self._byte, self._tokens_before = total_bytes, 0, tokens_before
        self._begin = self._shown = time.monotonic()
        self._first_byte: int | None = None
        self._is_terminal = self._out.isatty()

    def at_byte(self, byte: int) -> None:
        """So much of the text has been taken from the disk."""
        self._byte = byte

    def at_border(self, memory: MemorySnapshot) -> None:
        """Shows how far reading is, if it is time to."""
        if self._first_byte is None:
            self._first_byte = self._byte
        if time.monotonic() - self._shown >= (0.5 if self._is_terminal else 10):
            jax.block_until_ready(memory.state)
            self._show(memory.tokens_read)

    def end(self, memory: MemorySnapshot) -> None:
        """Shows what was read."""
        self._byte = self._total
        self._show(memory.tokens_read)
        if self._is_terminal:
            print(file=self._out)

    def _show(self, tokens: int) -> None:
        self._shown = now = time.monotonic()
        seconds = max(now - self._begin, 1e-9)
        rate = (tokens - self._tokens_before) / seconds
        share = self._byte / max(self._total, 1)
        done = self._byte - (self._first_byte or 0)
        left = f", {_minutes(seconds * (self._total - self._byte) / done)} left" if 0 < share < 1 and done > 0 else ""
        line = f"read {tokens:,} tokens, {rate:,.0f} tokens/s, {share:.0%}{left}"
        text, end = (f"\r\033[K{line}", "") if self._is_terminal else (line, "\n")
        print(text, end=end, file=self._out, flush=True)


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Saver:
    """Writes the memory to its file every so many tokens.

    Args:
      path: the memory file.
      every: tokens.
      memory: what was saved there last, or is known before reading.
    """

    def __init__(self, path: epath.PathLike, every: int, memory: MemorySnapshot):
        self._path, self._every, self._saved = path, every, memory.tokens_read
        self._fingerprint = model_fingerprint(memory.run)
        self._latest: MemorySnapshot | None = None

    def at_border(self, memory: MemorySnapshot) -> None:
        """Saves if it is time to."""
        self._latest = memory
        if memory.tokens_read - self._saved >= self._every:
            self.write(memory)

    def write(self, memory: MemorySnapshot) -> None:
        """Saves now; the old content stays until the new one is on the disk."""
        try:
            atomic.write_file(self._path, memory_file.encode(memory, self._fingerprint))
        except OSError as error:
            raise UserError(f"--save-memory {self._path}: cannot be written: {error}", status=1) from error
        self._saved, self._latest = memory.tokens_read, None

    def write_latest(self) -> None:
        """Saves the last border that was reached."""
        if self._latest is not None:
            self.write(self._latest)


def read_and_save(
    run: "Run",
    files: Sequence[TextFile],
    start_from: epath.PathLike | None = None,
    save_to: epath.PathLike | None = None,
    every: int = 100_000,
    progress: ReadProgress | None = None,
) -> MemorySnapshot:
    """Reads files into a memory; what an earlier call that was killed has saved is resumed.

    Args:
      run: a trained run.
      files: read one after another.
      start_from: memory file of what was read before; None: nothing.
      save_to: memory file to write; None: none.
      every: tokens between two saves while reading, at segment borders.
      progress: shows how far reading is.
    Returns:
      The memory after the last file.
    Raises:
      UserError: a memory file that does not fit, or `save_to` holds something else, which is not overwritten.
    """
    memory = empty_memory(run) if start_from is None else memory_file.load_memory(start_from, run)
    is_update = start_from is not None and save_to is not None and epath.Path(start_from) == epath.Path(save_to)
    if save_to is None or is_update:
        skipped = _files_before_partial(memory, files)
    else:
        memory, skipped = _saved_part(memory, files, save_to)
    remaining = files[skipped:]
    saver = None if save_to is None else Saver(save_to, every, memory)

    def at_border(memory: MemorySnapshot) -> None:
        if saver is not None:
            saver.at_border(memory)
        if progress is not None:
            progress.at_border(memory)

    try:
        memory = read_files(memory, remaining, at_border, lambda byte: progress.at_byte(byte) if progress else None)
    except KeyboardInterrupt:
        if saver is not None:
            saver.write_latest()
        raise
    if progress is not None and remaining:
        progress.end(memory)
    if saver is not None:
        saver.write(memory)
    return memory


def _saved_part(
    before: MemorySnapshot, files: Sequence[TextFile], save_to: epath.PathLike
) -> tuple[MemorySnapshot, int]:
    """What an earlier call with the same arguments has saved, or `before`; and how many files it holds completely."""
    if not epath.Path(save_to).exists():
        return before, _files_before_partial(before, files)
    saved = memory_file.load_memory(save_to, before.run)
    old = [source.sha256 for source in before.sources if source.is_complete]
    wanted = old + [file.sha256 for file in files]
    found = [source.sha256 for source in saved.sources]
    is_other_merge = saved.merged_from != before.merged_from
    if is_other_merge or found != wanted[: len(found)] or len(found) < len(before.sources):
        names = ", ".join(source.name for source in saved.sources) or "nothing"
        names += ", merged" * bool(saved.merged_from)
        raise UserError(
            f"--save-memory {save_to} exists and holds the memory of another text ({names}); it is not overwritten. "
            f"Choose another file, or add to it with --memory {save_to}"
        )
    return saved, sum(source.is_complete for source in saved.sources) - len(old)


def _files_before_partial(memory: MemorySnapshot, files: Sequence[TextFile]) -> int:
    """How many files come before the one that the memory holds in part, and are in the memory just before it."""
    if not memory.sources or memory.sources[-1].is_complete:
        return 0
    hashes = [source.sha256 for source in memory.sources]
    wanted = [file.sha256 for file in files]
    matches = (k for k in range(len(files)) if hashes[-k - 1 :] == wanted[: k + 1])
    return next(matches, 0)
