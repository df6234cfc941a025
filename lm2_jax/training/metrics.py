"""`metrics.jsonl` and TensorBoard in a workdir: one line a logged step, and no step twice."""

import json
import time
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import tensorboardX
from etils import epath

FILE = "metrics.jsonl"
SECONDS_BETWEEN_UPLOADS = 60.0


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path leads to a bucket, whose files cannot be appended to."""
    return "://" in str(path)


def read_lines(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a workdir's `metrics.jsonl`; one that a kill cut short is left out."""
    path = epath.Path(workdir) / FILE
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


class MetricsLog:
    """Writes metrics on the first process, and nothing on the others.

    Args:
      workdir: folder or bucket.
      step: the run goes on behind this step; lines of later steps, written before a crash, are dropped.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._path = epath.Path(workdir) / FILE
        self._lines = [json.dumps(line) + "\n" for line in read_lines(workdir) if line["step"] <= step]
        self._pending: list[str] = []
        self._uploaded = time.monotonic()
        _replace(self._path, "".join(self._lines))
        self._board = tensorboardX.SummaryWriter(str(epath.Path(workdir) / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds the line of one step; its values are finite."""
        if not self._writes:
            return
        self._pending.append(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if not is_remote(self._path) or time.monotonic() - self._uploaded > SECONDS_BETWEEN_UPLOADS:
            self.flush()

    def flush(self) -> None:
        """Makes all lines visible: appended to a local file; a bucket's file is written anew."""
        if not self._writes or not self._pending:
            return
        if is_remote(self._path):
            self._lines += self._pending
            self._path.write_text("".join(self._lines))
            self._uploaded = time.monotonic()
        else:
            with open(self._path, "a") as file:
                file.writelines(self._pending)
        self._pending = []
        self._board.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writes:
            self.flush()
            self._board.close()


def _replace(path: epath.Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one."""
    fresh = path.parent / f"{path.name}.new"
    fresh.write_text(text)
    fresh.replace(path)


def diagnostics(aux: dict[str, Any]) -> dict[str, float]:
    """The model's diagnostics as numbers, `memory/<name>/<layer>`; a layer is counted among those that have it."""
    values = {}
    for name, array in aux.items():
        per_layer = np.atleast_1d(np.asarray(array, np.float64))
        for layer, value in enumerate(per_layer.reshape(per_layer.shape[0], -1).mean(axis=1)):
            values[f"memory/{name}/{layer}"] = float(value)
    return values
