"""What a suite asks of a model: answers to prompts, and log-likelihoods of texts; on one device or on a mesh."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lm2_jax.config import RunConfig
from lm2_jax.data.base import Example, Tokenizer
from lm2_jax.data.text_tokens import Encoder
from lm2_jax.data.tokenizers import token_array
from lm2_jax.inference.engine import Engine, Request
from lm2_jax.layout import Layout, replicated
from lm2_jax.length import check_segments
from lm2_jax.loss import token_losses
from lm2_jax.runs import Run, load_run
from lm2_jax.training.workdir import read_config
from lm2_jax.types import Array, State

PIECE_SEGMENTS = 8  # segments given to one call while a text is long enough

LayoutOf = Callable[[RunConfig], Layout]
"""Gives the devices of a run; `sharding` implements it, and the program that starts an evaluation passes it on."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text and a question about it. Tokens are made at first use, so a set of prompts need not fit into memory.

    Training text has one blank between words and a blank before each sentence, so line breaks become blanks. The
    marker that precedes an answer in training follows the question. Without a question, the text is taken as it is.
    The order is instruction (with its examples), context, question.
    """

    tokenizer: Tokenizer
    context: str
    question: str | None = None
    instruction: str = ""

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """[S] token ids."""
        if self.question is None:
            return token_array(self.tokenizer, self.instruction + self.context).astype(np.int32)
        context = " ".join(f"{self.instruction} {self.context}".split())
        ids = token_array(self.tokenizer, f" {context}" if context else "")
        question = Encoder(self.tokenizer).question(self.question)
        return np.concatenate([ids.astype(np.int32), np.array(question, np.int32)])


class Answer(NamedTuple):
    """The answer to one prompt."""

    number: int  # of the prompt, from 0
    prompt: Prompt
    text: str


@runtime_checkable  # so that the annotations can be checked in tests
class Answerer(Protocol):
    """Whatever answers prompts: a trained run, or something built around one."""

    def answers(self, prompts: Iterable[Prompt], max_new_tokens: int, rows: int) -> Iterator[Answer]:
        """The answer to each prompt, in the order in which they end.

        Args:
          prompts: any number; each is taken when there is room for it.
          max_new_tokens: maximum length of an answer.
          rows: maximum number of prompts that are processed at the same time.
        """
        ...

    def loglikelihood(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """log p(continuation | prompt) of one batch of pairs, summed over the tokens of the continuation."""
        ...


def even_batches(sizes: Sequence[int], batch_rows: int) -> list[list[int]]:
    """Indices in batches of similar size: as few batches of at most `batch_rows` as possible, of equal length.

    Args:
      sizes: of the items, in any unit.
      batch_rows: maximum number of items in a batch.
    Returns:
      The batches, smallest items first; only the last one may be shorter.
    """
    if not sizes:
        return []
    batches = -(-len(sizes) // batch_rows)
    rows = -(-len(sizes) // batches)
    order = sorted(range(len(sizes)), key=lambda index: sizes[index])
    return [order[first : first + rows] for first in range(0, len(order), rows)]


class RunAnswerer:
    """Greedy answers and log-likelihoods of a trained run.

    Texts are read in pieces of a few fixed sizes with the state carried along. So programs are compiled once, and the
    device holds one piece and the state, never a complete text.

    Args:
      run: what `lm2_jax.load_run` gives; on a mesh, loaded with the same layout.
      layout: the devices; None: the first device.
      workdir: where the run was loaded from, for reports.
    """

    def __init__(self, run: Run, layout: Layout | None = None, workdir: str = ""):
        self.run, self.layout, self.workdir = run, layout, workdir
        self._start_of = functools.lru_cache(maxsize=8)(self._make_start)
        self._replicate = None if layout is None else jax.jit(lambda x: x, out_shardings=replicated(layout))

    @classmethod
    def load(cls, workdir: epath.PathLike, layout_of: LayoutOf | None = None) -> Self:
        """Loads a run from its workdir.

        Args:
          workdir: folder or bucket of the run.
          layout_of: gives its devices; None: the first device.
        Raises:
          UserError: as `load_run`, or the mesh does not fit the run.
        """
        layout = None if layout_of is None else layout_of(read_config(workdir))
        return cls(load_run(workdir, layout), layout, str(workdir))

    def answers(self, prompts: Iterable[Prompt], max_new_tokens: int, rows: int) -> Iterator[Answer]:
        """Repeats the most likely next token after each prompt; see `Answerer.answers`.

        Raises:
          UserError: an empty prompt, or a size below 1.
        """
        waiting: dict[int, Prompt] = {}

        def requests() -> Iterator[Request]:
            for number, prompt in enumerate(prompts):
                waiting[number] = prompt
                yield Request(prompt.tokens, number, max_new_tokens)

        for piece in Engine(self.run, rows=self._divisible(rows), layout=self.layout).generate(requests()):
            if piece.answer is not None:
                text = self.run.tokenizer.decode(piece.answer.ids)
                yield Answer(piece.index, waiting.pop(piece.index), text)

    def loglikelihood(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """log p(continuation | prompt) for each pair; see `Answerer.loglikelihood`.

        Raises:
          ValueError: an empty prompt or continuation.
        """
        firsts = [len(prompt.tokens) for prompt, _ in pairs]
        lasts = [np.array(self.run.tokenizer.encode(text), np.int32) for _, text in pairs]
        if 0 in firsts or not all(map(len, lasts)):
            raise ValueError("a prompt or continuation is empty")
        rows = [np.concatenate([prompt.tokens, last]) for (prompt, _), last in zip(pairs, lasts, strict=True)]
        losses = self.losses(rows)
        return [-float(loss[first - 1 :].sum()) for loss, first in zip(losses, firsts, strict=True)]

    def losses(self, texts: Sequence[np.ndarray], rows: int | None = None) -> list[np.ndarray]:
        """-log p(token | tokens before it) of every token but the first of each text, read at the same time.

        Args:
          texts: token ids of each text.
          rows: batch size to pad to.
        Returns:
          For each text of n tokens, n - 1 losses in float64.
        """
        count = self._divisible(max(rows or 0, len(texts)))
        longest = max(map(len, texts), default=0) - 1
        found: list[list[np.ndarray]] = [[] for _ in texts]
        with self._context():
            state, start = self._start_of(count), 0
            for size in _pieces(longest, self.run.model.config.segment_tokens):
                inputs, valid_BS = _piece([text[:-1] for text in texts], count, start, size, self.run.tokenizer.pad_id)
                targets, _ = _piece([text[1:] for text in texts], count, start, size, self.run.tokenizer.pad_id)
                loss_BS, _, state = self._score(inputs, targets, state, None, valid_BS, None)
                loss_BS = self._on_host(loss_BS)
                for row, losses in enumerate(found):
                    losses.append(loss_BS[row, valid_BS[row]].astype(np.float64))
                start += size
        return [np.concatenate([np.zeros(0), *losses]) for losses in found]

    def predict(self, batch: Example) -> np.ndarray:
        """[B S] the most likely token at each position of a batch; a few segments are read at a time."""
        rows, T = self._divisible(batch.tokens.shape[0]), self.run.model.config.segment_tokens
        padded = Example(*(np.pad(a, [(0, rows - len(a)), *[(0, 0)] * (a.ndim - 1)]) for a in batch))
        found, start = [], 0
        with self._context():
            state = self._start_of(rows)
            for size in _pieces(batch.tokens.shape[1], T):
                at, segments = slice(start, start + size), slice(start // T, (start + size) // T)
                tokens, targets, valid, document = (
                    a[:, at] for a in (padded.tokens, padded.targets, padded.valid, padded.document)
                )
                document = document if self.run.config.data.source.packs else None
                reset = padded.reset[:, segments]
                _, predicted_BS, state = self._score(tokens, targets, state, reset, valid, document)
                found.append(self._on_host(predicted_BS)[: len(batch.tokens)])
                start += size
        return np.concatenate(found, axis=1)

    def _score(self, tokens: Any, targets: Any, state: Any, reset: Any, valid: Any, document: Any) -> Any:
        check_segments(self.run.config.model, state, tokens.shape, reset, valid, document)
        chunk = self.run.config.loss.time_chunk
        return _score(self.run.model, chunk, self.run.params, tokens, targets, state, reset, valid, document)

    def _context(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.layout is None else self.layout.context()

    def _divisible(self, rows: int) -> int:
        """`rows`, rounded up to a number that the devices of the batch axis divide."""
        if self.layout is None:
            return rows
        # Whatever shares the batch divides the number of all devices.
        devices = len(replicated(self.layout).device_set)
        split = self.layout.shardings(("batch",), jax.ShapeDtypeStruct((devices,), jnp.int32))
        shards = devices // split.shard_shape((devices,))[0]
        return -(-rows // shards) * shards

    def _make_start(self, rows: int) -> State:
        """The state before any text."""
        model = self.run.model
        if self.layout is None:
            return model.init_state(rows)
        shapes = jax.eval_shape(lambda: model.init_state(rows))
        return jax.jit(
            lambda: model.init_state(rows), out_shardings=self.layout.shardings(model.state_axes(), shapes)
        )()

    def _on_host(self, array: Array) -> np.ndarray:
        """The values of an array, on every process."""
        array = array if self._replicate is None else self._replicate(array)
        return np.asarray(array)


def _pieces(length: int, segment_tokens: int) -> list[int]:
    """Sizes of the pieces that cover `length` tokens: large ones, then single segments."""
    large = PIECE_SEGMENTS * segment_tokens
    count, rest = divmod(max(length, 0), large)
    return [large] * count + [segment_tokens] * -(-rest // segment_tokens)


def _piece(texts: Sequence[np.ndarray], rows: int, start: int, size: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `start` to `start + size` of each text, padded, and where they are valid."""
    tokens_BS, valid_BS = np.full((rows, size), pad_id, np.int32), np.zeros((rows, size), bool)
    for row, text in enumerate(texts):
        piece = text[start : start + size]
        tokens_BS[row, : len(piece)] = piece
        valid_BS[row, : len(piece)] = True
    return tokens_BS, valid_BS


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    model: Any,
    time_chunk: int,
    params: Any,
    tokens: Any,
    targets: Any,
    state: Any,
    reset: Any,
    valid: Any,
    document: Any,
) -> tuple[Array, Array, State]:
    """Loss and most likely token at each position of K segments, and the state after them."""
    out = model.apply({"params": params}, tokens, state, reset, valid, method="forward", document=document)
    loss_BS, predicted_BS = token_losses(model, params, out.hidden, targets, time_chunk)
    return loss_BS, predicted_BS, out.state
