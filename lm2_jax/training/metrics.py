"""`metrics.jsonl` and TensorBoard in a workdir: one line for each logged step, and no step twice."""

import json
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from etils import epath
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from lm2_jax.atomic import is_remote, write_file
from lm2_jax.training.lock import TakenOver
from lm2_jax.training.trackers import NoTracker, TrackerConfig, open_tracker

FILE, DAMAGED = "metrics.jsonl", "metrics.damaged.jsonl"
BOARD = "tensorboard"
SECONDS_BETWEEN_UPLOADS = 60.0


def read_lines(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a workdir's `metrics.jsonl`, without damaged ones."""
    return [json.loads(line) for line in _split(workdir)[0].values()]


def remove(workdir: epath.Path) -> None:
    """Removes the metrics of a start after which nothing was saved."""
    (workdir / FILE).unlink(missing_ok=True)
    board = workdir / BOARD
    for path in board.iterdir() if board.is_dir() else ():
        if "tfevents" in path.name:
            path.unlink()


def _split(workdir: epath.PathLike) -> tuple[dict[int, bytes], list[bytes]]:
    """The good lines by step, and the damaged ones but for a last one that a kill cut short."""
    path = epath.Path(workdir) / FILE
    good: dict[int, bytes] = {}
    damaged: list[bytes] = []
    content = path.read_bytes() if path.exists() else b""
    lines = content.split(b"\n")
    for number, line in enumerate(lines):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            step = None
        if type(step) is int:
            good[step] = line
        elif line.strip() and number < len(lines) - 1:
            damaged.append(line)
    return good, damaged


class MetricsLog:
    """Writes metrics on the first process, and nothing on the others.

    A damaged line of an earlier start is moved to `metrics.damaged.jsonl` with a warning.

    Args:
      workdir: folder or bucket.
      step: the run resumes after this step; lines of later steps, written before a crash, are dropped.
      tracker: gets the same lines, but for steps that were logged before a crash.
      config: the run's config, which the tracker shows.
    Raises:
      UserError: the tracker refuses.
      OSError: the files cannot be written; so do the methods.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        step: int,
        tracker: TrackerConfig = NoTracker(),
        config: Mapping[str, Any] | None = None,
    ):
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        workdir = epath.Path(workdir)
        self._path = workdir / FILE
        good, damaged = _split(workdir)
        if damaged:
            aside = workdir / DAMAGED
            earlier = aside.read_bytes() if aside.exists() else b""
            write_file(aside, earlier + b"".join(line + b"\n" for line in damaged))
            print(f"warning: {self._path}: {len(damaged)} damaged lines were moved to {aside}", file=sys.stderr)
        self._tracker = open_tracker(tracker, workdir, dict(config or {}))
        self._tracked = max(good, default=0) if self._tracker is not None and self._tracker.is_resumed else 0
        self._lines = [good[at] + b"\n" for at in sorted(good) if at <= step]
        self._pending: list[bytes] = []
        self._uploaded = time.monotonic()
        write_file(self._path, b"".join(self._lines))
        self._board = _EventFile(workdir / BOARD, step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds the line of one step; its values are finite."""
        if not self._writes:
            return
        self._pending.append((json.dumps({"step": step, **values}, allow_nan=False) + "\n").encode())
        self._board.add(step, values)
        if self._tracker is not None and step > self._tracked:
            self._tracker.tracker.log(step, values)
        if not is_remote(self._path) or time.monotonic() - self._uploaded > SECONDS_BETWEEN_UPLOADS:
            self.flush()

    def flush(self) -> None:
        """Makes all lines visible: appended to a local file, while a bucket's file is replaced."""
        if not self._writes or not self._pending:
            return
        self._board.flush()
        if is_remote(self._path):
            self._lines += self._pending
            self._path.write_bytes(b"".join(self._lines))
            self._uploaded = time.monotonic()
        else:
            _append(self._path, b"".join(self._pending))
        self._pending = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, TakenOver):  # a bucket's file would be replaced, and it is another process's
            return
        try:
            self.flush()
        except OSError:
            if error is None:  # the first error is the one to report
                raise
        finally:
            if self._writes and self._tracker is not None:
                self._tracker.tracker.finish()


class _EventFile:
    """A TensorBoard file, written here and now: no thread of its own holds points back or dies unheard."""

    def __init__(self, folder: epath.Path, first_step: int):
        self._remote = is_remote(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path, self._content, self._pending = folder / name, b"", b""
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if first_step > 1:  # TensorBoard forgets points of later steps, written before a crash
            restart = SessionLog(status=SessionLog.SessionStatus.START)
            self._append(Event(wall_time=time.time(), step=first_step, session_log=restart))
        self._path.write_bytes(b"")
        self.flush()

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
            self._append(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        if self._remote:
            self._content += self._pending
            self._path.write_bytes(self._content)
        else:
            _append(self._path, self._pending)
        self._pending = b""

    def _append(self, event: Event) -> None:
        """Adds a record: a length, its checksum, the event, its checksum."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._pending += length + _masked_crc(length) + data + _masked_crc(data)


def _append(path: epath.Path, content: bytes) -> None:
    """Appends to a local file, which must still be there; an error names it."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_APPEND), "ab") as file:
            file.write(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def diagnostics(aux: dict[str, Any]) -> dict[str, float]:
    """The model's diagnostics as numbers, `memory/<name>/<layer>`; a layer is counted among those that have it."""
    values = {}
    for name, array in aux.items():
        per_layer = np.atleast_1d(np.asarray(array, np.float64))
        for layer, value in enumerate(per_layer.reshape(per_layer.shape[0], -1).mean(axis=1)):
            values[f"memory/{name}/{layer}"] = float(value)
    return values
