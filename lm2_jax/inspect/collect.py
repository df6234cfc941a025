"""Reads a text segment by segment and keeps what the model reveals: losses, gates, read weights, states."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax.inference.snapshot import MemorySnapshot, empty_memory
from lm2_jax.inspect.states import StateArray, state_arrays
from lm2_jax.memory.base import INSIGHT, READ_WEIGHTS
from lm2_jax.model import LanguageModel, ModelState
from lm2_jax.runs import Run
from lm2_jax.types import Array, Float

KEPT_FLOATS = 1 << 25  # of states that are kept to be compared with the last one
MOST_KEPT = 128
STATE_NORM = "state_norm"  # the metric that `states` measures itself, for every memory


class Look(NamedTuple):
    """What one segment shows."""

    losses_T: Float[Array, " T"]  # -log p of each token given those before it
    logits_V: Float[Array, " V"]  # after the last valid token
    state: ModelState
    metrics: dict[str, Array]  # one value per layer that has it
    insight: Any  # what modules reveal


@functools.partial(jax.jit, static_argnums=0)
def look(
    model: LanguageModel, params: Any, state: ModelState, before_V: Array, tokens_1T: Array, valid_1T: Array
) -> Look:
    """Feeds one segment to one row.

    Args:
      model: the model.
      params: its parameters.
      state: at the segment's start.
      before_V: logits after the token before the segment.
      tokens_1T: the segment.
      valid_1T: true for tokens, which come first; false for padding.
    """
    arguments: Any = (tokens_1T, state, None, valid_1T)
    result: Any = model.apply({"params": params}, *arguments, method="forward", with_logits=True, mutable=[INSIGHT])
    out, found = result
    logits_TV = out.logits[0]
    predicted_TV = jnp.concatenate([before_V[None].astype(logits_TV.dtype), logits_TV[:-1]])
    chosen_T = jnp.take_along_axis(predicted_TV, tokens_1T[0][:, None], axis=1)[:, 0]
    losses_T = jax.nn.logsumexp(predicted_TV, axis=-1) - chosen_T
    return Look(losses_T, logits_TV[valid_1T.sum() - 1], out.state, out.aux, found.get(INSIGHT, {}))


def read_weights(insight: Any, tokens: int) -> dict[int, np.ndarray]:
    """{block: [T N]} share of each slot in what each token reads, mean over heads; empty where nothing reveals it."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(insight):
        names = [str(getattr(entry, "key", "")) for entry in path]
        if READ_WEIGHTS not in names:
            continue
        first = int(names[0].rpartition("_")[2])  # blocks_3 is the group that begins with block 3
        weights_LTHN = np.asarray(leaf, np.float32).reshape(-1, tokens, *leaf.shape[-2:])
        found |= {first + i: weights_THN.mean(axis=1) for i, weights_THN in enumerate(weights_LTHN)}
    return dict(sorted(found.items()))


class TokenReads(NamedTuple):
    """Which slots some tokens read, from the memory before and after an update."""

    tokens: np.ndarray  # [n] int32
    before: dict[int, np.ndarray]  # block -> [n N]
    after: dict[int, np.ndarray]


@dataclasses.dataclass
class Reading:
    """Everything that was kept of a text."""

    memory: MemorySnapshot  # after the text
    tokens: np.ndarray  # [n] int32
    losses: np.ndarray  # [n] float32; the first one has no prediction: NaN
    metrics: dict[str, np.ndarray]  # name -> [segments, layers]
    usage: dict[int, np.ndarray]  # block -> [segments N]: mean read weight of each slot
    norms: dict[str, np.ndarray]  # state array -> [segments]
    changes: dict[str, np.ndarray]  # state array with slots -> [segments N]: distance that each slot moved
    kept_at: np.ndarray  # segments after which states were compared with the last one
    similarity: dict[str, np.ndarray]  # state array -> [kept]: cosine with the state after the last segment
    segments: int  # full ones
    segment: int  # the one whose tokens are shown
    segment_reads: TokenReads


class _Kept:
    """States at evenly spaced segments; half of them are dropped when there are too many."""

    def __init__(self, floats: int):
        self._most = max(2, min(MOST_KEPT, KEPT_FLOATS // max(floats, 1)))
        self._every = 1
        self.states: dict[int, list[StateArray]] = {}

    def add(self, segment: int, arrays: list[StateArray]) -> None:
        if segment % self._every == 0:
            self.states[segment] = arrays
        if len(self.states) > self._most:
            self._every *= 2
            self.states = {at: kept for at, kept in self.states.items() if at % self._every == 0}


class _Collector:
    """Takes segments one by one.

    Args:
      run: the model.
      shown: number of the segment whose tokens are shown; None: the last full one.
    """

    def __init__(self, run: Run, shown: int | None):
        self.run, self._shown = run, shown
        self.memory = empty_memory(run)
        self._floats = sum(array.values.size for array in state_arrays(run, self.memory.state))
        self._kept = _Kept(self._floats)
        self._losses: list[np.ndarray] = []
        self._metrics: list[dict[str, np.ndarray]] = []
        self._usage: list[dict[int, np.ndarray]] = []
        self._norms: list[dict[str, float]] = []
        self._changes: list[dict[str, np.ndarray]] = []
        self._before: tuple[MemorySnapshot, np.ndarray, MemorySnapshot] | None = None
        self._last: list[StateArray] = []

    def take(self, tokens_T: np.ndarray) -> None:
        """One full segment."""
        before, number = self.memory, len(self._norms)
        seen = _look(before, tokens_T)
        self.memory = dataclasses.replace(
            before, state=seen.state, logits_V=seen.logits_V, tokens_read=before.tokens_read + len(tokens_T)
        )
        losses_T = np.array(seen.losses_T, np.float32)
        if number == 0:
            losses_T[0] = np.nan
        self._losses.append(losses_T)
        self._metrics.append({name: np.asarray(values) for name, values in seen.metrics.items()})
        weights = read_weights(seen.insight, len(tokens_T))
        self._usage.append({block: weights_TN.mean(axis=0) for block, weights_TN in weights.items()})
        arrays = state_arrays(self.run, seen.state)
        self._norms.append({array.label: float(np.linalg.norm(array.values)) for array in arrays})
        self._changes.append(_slot_changes(self._last, arrays))
        self._kept.add(number, arrays)
        self._last = arrays
        if self._shown is None or self._shown == number:
            self._before = before, tokens_T, self.memory

    def finish(self, tokens: np.ndarray) -> Reading:
        """Adds the rest of the text, less than a segment, and returns everything."""
        T = self.run.config.model.segment_tokens
        rest = tokens[len(self._norms) * T :]
        if len(rest):
            self._losses.append(np.asarray(_look(self.memory, rest).losses_T, np.float32)[: len(rest)])
        memory = dataclasses.replace(
            self.memory, open_tokens=rest.astype(np.int32), tokens_read=self.memory.tokens_read + len(rest)
        )
        assert self._before is not None
        before, shown_T, after = self._before
        reads = TokenReads(shown_T, _weights(before, shown_T), _weights(after, shown_T))
        return Reading(
            memory=memory,
            tokens=tokens,
            losses=np.concatenate(self._losses),
            metrics=_columns(self._metrics),
            usage=_columns(self._usage),
            norms=_columns(self._norms),
            changes=_columns(self._changes[1:]),
            kept_at=np.array(sorted(self._kept.states)),
            similarity=_similarities(self._kept.states, self._last),
            segments=len(self._norms),
            segment=before.tokens_read // T,
            segment_reads=reads,
        )


def read_text(
    run: Run,
    pieces: Iterable[np.ndarray],
    shown: int | None = None,
    at_border: Callable[[MemorySnapshot], None] = lambda memory: None,
) -> Reading | None:
    """Reads a text and keeps what the model reveals.

    Args:
      run: a trained run.
      pieces: the tokens of the text, cut anywhere.
      shown: number of the segment whose tokens are shown, from 0; None: the last full one.
      at_border: called after each segment.
    Returns:
      Everything that was kept; None for a text without the segment that is to be shown.
    """
    T, collector, taken = run.config.model.segment_tokens, _Collector(run, shown), 0
    tokens = np.zeros(0, np.int32)
    kept: list[np.ndarray] = []
    for piece in pieces:
        tokens = np.concatenate([tokens, piece])
        while len(tokens) >= T:
            collector.take(tokens[:T])
            kept.append(tokens[:T])
            tokens, taken = tokens[T:], taken + 1
            at_border(collector.memory)
    if taken <= (shown or 0):
        return None
    return collector.finish(np.concatenate([*kept, tokens]))


class Asked(NamedTuple):
    """A question, asked of a memory."""

    weights: dict[int, np.ndarray]  # block -> [n N], of the question's tokens
    probabilities: np.ndarray  # [V] of the next token


def ask(memory: MemorySnapshot, question: np.ndarray) -> Asked:
    """What the tokens of a question read, and what is expected after them; the memory is not changed."""
    T, count = memory.run.config.model.segment_tokens, len(question)
    text, weights = np.concatenate([memory.open_tokens, question.astype(np.int32)]), []
    for first in range(0, len(text), T):
        part = text[first : first + T]
        seen = _look(memory, part)
        weights.append({block: rows[: len(part)] for block, rows in read_weights(seen.insight, T).items()})
        memory = dataclasses.replace(memory, state=seen.state, logits_V=seen.logits_V)
    together = {block: np.concatenate([part[block] for part in weights])[-count:] for block in weights[0]}
    return Asked(together, np.asarray(jax.nn.softmax(jnp.asarray(memory.logits_V, jnp.float32))))


def _look(memory: MemorySnapshot, part: np.ndarray) -> Look:
    """Up to one segment of tokens after what is remembered at the last border."""
    run, T = memory.run, memory.run.config.model.segment_tokens
    tokens_1T, valid_1T = np.zeros((1, T), np.int32), np.arange(T)[None] < len(part)
    tokens_1T[0, : len(part)] = part
    return look(run.model, run.params, memory.state, jnp.asarray(memory.logits_V), tokens_1T, valid_1T)


def _weights(memory: MemorySnapshot, tokens_T: np.ndarray) -> dict[int, np.ndarray]:
    return read_weights(_look(memory, tokens_T).insight, len(tokens_T))


def _slot_changes(before: list[StateArray], after: list[StateArray]) -> dict[str, np.ndarray]:
    """How far each slot moved, of the arrays that have slots."""
    changes = {}
    for old, new in zip(before, after, strict=False):
        if new.slot_axis is not None:
            moved = np.moveaxis(new.values - old.values, new.slot_axis, 0)
            changes[new.label] = np.linalg.norm(moved.reshape(len(moved), -1), axis=1)
    return changes


def _similarities(states: dict[int, list[StateArray]], last: list[StateArray]) -> dict[str, np.ndarray]:
    found: dict[str, list[float]] = {}
    for at in sorted(states):
        for array, end in zip(states[at], last, strict=True):
            scale = np.linalg.norm(array.values) * np.linalg.norm(end.values)
            cosine = float((array.values * end.values).sum() / scale) if scale else float("nan")
            found.setdefault(end.label, []).append(cosine)
    return {label: np.array(values) for label, values in found.items()}


def _columns(rows: list[Any]) -> dict[Any, np.ndarray]:
    """Values by name, one row per segment."""
    return {name: np.stack([np.asarray(row[name]) for row in rows]) for name in (rows[0] if rows else ())}
