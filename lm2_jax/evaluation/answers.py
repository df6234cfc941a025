"""Answers on disk as soon as they are given, so that an interrupted evaluation resumes where it stopped."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from lm2_jax import atomic
from lm2_jax.config import to_dict
from lm2_jax.runs import Run
from lm2_jax.training.hosts import all_gather_hosts, run_on_all_hosts
from lm2_jax.types import Array, PyTree


def identity_of(run: Run, **options: Any) -> dict[str, Any]:
    """All that an answer depends on except its question: the model, its weights, its tokenizer, and `options`."""
    return {
        "preset": run.config.name,
        "step": int(run.step),
        "model": _digest(to_dict(run.config.model)),
        "weights": _digest(np.asarray(_bit_sums(run.params)).tolist()),
        "tokenizer": run.tokenizer.fingerprint,
        **options,
    }


class AnswerLog:
    """A file of answers, one JSON object per line, that is only appended to.

    Each line has an `id`, a hash of the question and of all that the answer depends on. Lines with other ids are
    answers of another evaluation: they are kept until `final` replaces the file. On several processes the first one
    reads and writes the file, and all hold the same answers.

    Args:
      path: the file, in a folder that exists.
      identity: what answers depend on except their question, see `identity_of`.
      resume: whether to use answers that are in the file.
    """

    def __init__(self, path: epath.Path, identity: Mapping[str, Any], resume: bool = True):
        self._path, self._identity = path, dict(identity)
        content = _from_first(run_on_all_hosts(self._repaired if jax.process_index() == 0 else bytes))
        self._answers: dict[str, dict[str, Any]] = {}
        for line in content.splitlines() if resume else []:
            answer = _parsed(line)
            if answer is not None:
                self._answers[answer["id"]] = answer

    def id(self, **question: Any) -> str:
        """The id of the answer to a question."""
        return _digest([self._identity, question])

    def __contains__(self, id: str) -> bool:
        return id in self._answers

    def __getitem__(self, id: str) -> dict[str, Any]:
        return self._answers[id]

    def append(self, answers: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds answers by id; they are on the disk when this returns.

        Raises:
          OSError: the file cannot be written.
        """
        lines = {id: {"id": id, **answer} for id, answer in answers.items()}
        content = to_lines(lines.values())
        run_on_all_hosts(lambda: self._write(content) if jax.process_index() == 0 else None)
        self._answers |= lines

    def final(self, ids: Iterable[str]) -> bytes:
        """The content of the file when all answers are given: those of `ids`, in this order."""
        return to_lines(self._answers[id] for id in ids)

    def _write(self, content: bytes) -> None:
        if atomic.is_remote(self._path):  # objects in a bucket cannot be appended to
            old = self._path.read_bytes() if self._path.exists() else b""
            atomic.write_file(self._path, old + content)
            return
        with open(self._path, "ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _repaired(self) -> bytes:
        """The content of the file, without a last line that was being written when an evaluation was killed."""
        if not self._path.exists():
            return b""
        content = self._path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            if atomic.is_remote(self._path):
                atomic.write_file(self._path, complete)
            else:
                os.truncate(self._path, len(complete))
        return complete


def to_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """One JSON object per line, in ASCII, so that no other line separator occurs in it."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of the file; None if it is damaged, so its question is asked again."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) and isinstance(answer.get("id"), str) else None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


@jax.jit
def _bit_sums(params: PyTree) -> Array:
    """The bits of each array, summed modulo 2^32: the same however the array is sharded."""

    def bit_sum(x: Array) -> Array:
        word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
        return jnp.sum(jax.lax.bitcast_convert_type(x, word), dtype=jnp.uint32)

    return jnp.stack([bit_sum(leaf) for leaf in jax.tree.leaves(params)])


def _from_first(content: bytes) -> bytes:
    """The first process's bytes, on all processes."""
    if jax.process_count() == 1:
        return content
    size = int(all_gather_hosts(np.int32(len(content)))[0])
    if not size:
        return b""
    mine = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        mine[:] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).astype(np.uint8).tobytes()
