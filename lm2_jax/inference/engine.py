"""Answers to any number of prompts on a fixed number of rows; a finished row takes the next prompt.

A row goes through its prompt in full segments from border to border, then takes the rest in one piece, then one token
at a time. Each of these steps is one compiled program for all rows, and a row's results depend on its own tokens alone.
So a text does not depend on which prompts share a batch, and nothing is compiled after the first few steps.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax import streaming
from lm2_jax.errors import UserError
from lm2_jax.inference.sampling import Sampling, SamplingRows, choose, sampling_rows
from lm2_jax.inference.snapshot import MemorySnapshot, empty_memory
from lm2_jax.inference.texts import AnswerText
from lm2_jax.layout import Layout, replicated
from lm2_jax.length import check_tokens
from lm2_jax.model import LanguageModel, ModelState, StreamState
from lm2_jax.state import select_rows
from lm2_jax.types import Array, Bool, Float, Int

if TYPE_CHECKING:
    from lm2_jax.runs import Run

Params = Any


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    tokens: np.ndarray  # [n] int; may be empty after a memory
    index: int = 0  # number of the prompt, for random draws
    max_new_tokens: int = 64
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()  # the text ends before the first of these strings
    end_ids: tuple[int, ...] = ()  # tokens that end the answer, besides the one that ends a document


class Piece(NamedTuple):
    """A part of an answer as it comes."""

    index: int  # of the request
    text: str
    answer: AnswerText | None  # with the last piece: all of it


class Cells(NamedTuple):
    """All arrays of an engine, B rows."""

    carry: StreamState
    logits_BV: Float[Array, "B V"]  # after the last token of each row
    seen_BV: Bool[Array, "B V"]  # tokens of the prompt and the answer


class _Row:
    """A request in its row."""

    def __init__(self, request: Request, before: np.ndarray, tokenizer: Any):
        self.request = request
        self.rest = np.concatenate([before, np.asarray(request.tokens, np.int32)])  # tokens to be read
        self.is_open = False  # the prompt's full segments have been read
        self.answer = AnswerText(tokenizer, request.stop)


class Engine:
    """Generates text with one model from one memory.

    Args:
      run: the model; on a mesh, loaded with the same layout.
      memory: what all prompts follow; it is only read. None: nothing.
      rows: prompts that are processed at the same time.
      layout: the devices; None: the first device.
    Raises:
      UserError: the memory is one of another model or tokenizer.
    """

    def __init__(self, run: "Run", memory: MemorySnapshot | None = None, rows: int = 8, layout: Layout | None = None):
        if rows < 1:
            raise UserError(f"rows={rows}: expected a number of at least 1")
        if memory is not None:
            memory.check_run(run)
        self._run, self._rows, self._layout = run, rows, layout
        self._memory = empty_memory(run) if memory is None else memory
        # On a mesh, an array of the host is the same on all devices.
        self._memory_state = self._memory.state if layout is None else jax.device_get(self._memory.state)
        # Of the host for every memory: read, loaded or empty, so that one compiled program serves all.
        self._logits_V = np.asarray(jax.device_get(self._memory.logits_V))
        self._replicate = None if layout is None else jax.jit(lambda x: x, out_shardings=replicated(layout))

    def generate(self, requests: Iterable[Request]) -> Iterator[Piece]:
        """Continues each prompt; pieces of different answers come in any order.

        Args:
          requests: taken one by one as rows become free, so there may be any number.
        Yields:
          Text as it is known, and with the last piece of an answer the answer.
        Raises:
          UserError: an empty prompt after an empty memory, a token outside the vocabulary, or a text that would be
            longer than `decoder.max_tokens`.
        """
        waiting = iter(requests)
        rows: list[_Row | None] = [None] * self._rows
        cells, settings = self._start(), self._settings(rows)
        while True:
            with self._context():
                cells, has_changed = self._admit(waiting, rows, cells)
                settings = self._settings(rows) if has_changed else settings
                if not any(rows):
                    return
                cells = self._read(rows, cells)
                chosen_B, cells = self._choose(rows, cells, settings)
            yield from self._extend_answers(rows, chosen_B)
            with self._context():
                cells = self._feed(rows, cells, chosen_B)

    def _admit(self, waiting: Iterator[Request], rows: list[_Row | None], cells: Cells) -> tuple[Cells, bool]:
        """Puts waiting requests into free rows."""
        memory, run = self._memory, self._run
        is_new_B = np.zeros(self._rows, bool)
        seen_BV = np.zeros((self._rows, run.config.model.vocab_size), bool)
        for index in [index for index, row in enumerate(rows) if row is None]:
            request = next(waiting, None)
            if request is None:
                break
            rows[index] = row = _Row(request, memory.open_tokens, run.tokenizer)
            self._check(request, row)
            is_new_B[index] = True
            seen_BV[index, np.asarray(request.tokens, int)] = True
        if not is_new_B.any():
            return cells, False
        return _put_rows(run.model, cells, self._memory_state, self._logits_V, seen_BV, is_new_B), True

    def _check(self, request: Request, row: _Row) -> None:
        if request.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={request.max_new_tokens}: expected a number of at least 1")
        if not len(row.rest) and not self._memory.tokens_read:
            raise UserError(f"prompt {request.index} is empty; a model continues at least one token")
        size = self._run.config.model.vocab_size
        if len(row.rest) and (row.rest.min() < 0 or row.rest.max() >= size):
            raise UserError(f"prompt {request.index} has tokens outside the model's vocabulary of {size}")
        # The last token that is generated is not read.
        check_tokens(self._run.config.model, self._memory.state, len(row.rest) + request.max_new_tokens - 1)

    def _read(self, rows: list[_Row | None], cells: Cells) -> Cells:
        """One full segment of the rows that have one to read; the rest of the prompt where there is none."""
        run, T = self._run, self._run.config.model.segment_tokens
        reading = [i for i, row in enumerate(rows) if row and not row.is_open and len(row.rest) >= T]
        if reading:
            tokens_BT, count_B = self._taken(rows, reading, T)
            logits_BV, state = streaming.read_segment(run.model, run.params, cells.carry.state, tokens_BT, count_B > 0)
            cells = cells._replace(
                carry=cells.carry._replace(state=state), logits_BV=_keep(logits_BV, cells.logits_BV, count_B > 0)
            )
        opening = [i for i, row in enumerate(rows) if row and not row.is_open and len(row.rest) < T]
        if not opening:
            return cells
        is_opened_B = np.zeros(self._rows, bool)
        is_opened_B[opening] = True
        cells = cells._replace(carry=streaming.open_rows(run.model, run.params, cells.carry, is_opened_B))
        tokens_BT, count_B = self._taken(rows, opening, T)
        for index in opening:
            row = rows[index]
            assert row is not None
            row.is_open = True
        return self._advance(cells, tokens_BT, count_B) if count_B.any() else cells

    def _taken(self, rows: list[_Row | None], indices: list[int], T: int) -> tuple[np.ndarray, np.ndarray]:
        """The next up to T tokens of some rows, which they no longer have to read."""
        tokens_BT, count_B = np.zeros((self._rows, T), np.int32), np.zeros(self._rows, np.int32)
        for index in indices:
            row = rows[index]
            assert row is not None
            taken, row.rest = row.rest[:T], row.rest[T:]
            tokens_BT[index, : len(taken)], count_B[index] = taken, len(taken)
        return tokens_BT, count_B

    def _choose(self, rows: list[_Row | None], cells: Cells, settings: SamplingRows) -> tuple[np.ndarray, Cells]:
        """The next token of each row whose prompt has been read; -1 in the others."""
        is_open_B = np.array([row is not None and row.is_open for row in rows])
        if not is_open_B.any():
            return np.full(self._rows, -1), cells
        number_B = np.array([len(row.answer.ids) if row else 0 for row in rows], np.int32)
        token_B, seen_BV = _next_tokens(cells.logits_BV, cells.seen_BV, settings, number_B)
        token_B = token_B if self._replicate is None else self._replicate(token_B)
        return np.where(is_open_B, np.asarray(token_B), -1), cells._replace(seen_BV=seen_BV)

    def _extend_answers(self, rows: list[_Row | None], chosen_B: np.ndarray) -> Iterator[Piece]:
        """Adds the chosen tokens to the answers, and frees the rows of those that end."""
        for index, token in enumerate(chosen_B):
            row = rows[index]
            if row is None or token < 0:
                continue
            answer, request = row.answer, row.request
            is_end = token == self._run.tokenizer.eos_id or token in request.end_ids
            text = "" if is_end else answer.push(int(token))
            if is_end or answer.is_stopped or len(answer.ids) == request.max_new_tokens:
                rows[index] = None
                yield Piece(request.index, text + answer.finish(), answer)
            elif text:
                yield Piece(request.index, text, None)

    def _feed(self, rows: list[_Row | None], cells: Cells, chosen_B: np.ndarray) -> Cells:
        """Gives each row that continues the token that was chosen."""
        count_B = np.array([row is not None and token >= 0 for row, token in zip(rows, chosen_B, strict=True)])
        if not count_B.any():
            return cells
        tokens_B1 = np.where(count_B, chosen_B, 0).astype(np.int32)[:, None]
        return self._advance(cells, tokens_B1, count_B.astype(np.int32))

    def _advance(self, cells: Cells, tokens_BS: np.ndarray, count_B: np.ndarray) -> Cells:
        run = self._run
        logits_BV, carry = streaming.advance(run.model, run.params, cells.carry, tokens_BS, count_B, all_logits=False)
        return cells._replace(carry=carry, logits_BV=_keep(logits_BV, cells.logits_BV, count_B > 0))

    def _settings(self, rows: list[_Row | None]) -> SamplingRows:
        return sampling_rows([(row.request.sampling, row.request.index) if row else (Sampling(), 0) for row in rows])

    def _context(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._layout is None else self._layout.context()

    def _start(self) -> Cells:
        """Arrays of rows without any text."""
        run = self._run
        model, vocab = run.model, run.config.model.vocab_size
        with self._context():
            state = self._start_state()
            carry = streaming.open_segment(model, run.params, state, self._rows)
            logits_BV = jnp.zeros((self._rows, vocab), self._memory.logits_V.dtype)
            return Cells(carry, logits_BV, jnp.zeros((self._rows, vocab), bool))

    def _start_state(self) -> ModelState:
        model = self._run.model
        if self._layout is None:
            return model.init_state(self._rows)
        shapes = jax.eval_shape(lambda: model.init_state(self._rows))
        return jax.jit(
            lambda: model.init_state(self._rows), out_shardings=self._layout.shardings(model.state_axes(), shapes)
        )()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _put_rows(
    model: LanguageModel,
    cells: Cells,
    state: ModelState,
    logits_V: Float[Array, " V"],
    seen_BV: Bool[Array, "B V"],
    is_new_B: Bool[Array, " B"],
) -> Cells:
    """Rows that begin with a memory of one row."""
    state = select_rows(is_new_B, state, cells.carry.state, model.state_axes())
    position_B = jnp.where(is_new_B, 0, cells.carry.position)
    return Cells(
        cells.carry._replace(state=state, position=position_B),
        jnp.where(is_new_B[:, None], logits_V[None], cells.logits_BV),
        jnp.where(is_new_B[:, None], seen_BV, cells.seen_BV),
    )


@jax.jit
def _next_tokens(
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"],
    settings: SamplingRows,
    number_B: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Bool[Array, "B V"]]:
    """The next token of each row, and the tokens seen with it."""
    token_B = choose(logits_BV, seen_BV, settings, number_B)
    return token_B, seen_BV | (jnp.arange(logits_BV.shape[1])[None] == token_B[:, None])


@jax.jit
def _keep(new_BV: Array, old_BV: Array, has_new_B: Array) -> Array:
    return jnp.where(has_new_B[:, None], new_BV, old_BV)
