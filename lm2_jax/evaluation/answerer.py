"""What a suite asks of a model: answers to prompts, and log-likelihoods of texts; on one device or on a mesh."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lm2_jax import streaming
from lm2_jax.config import RunConfig
from lm2_jax.data.base import Example, Tokenizer
from lm2_jax.data.text_tokens import Encoder
from lm2_jax.data.tokenizers import token_array
from lm2_jax.layout import Layout, replicated
from lm2_jax.loss import token_losses
from lm2_jax.runs import Run, load_run
from lm2_jax.training.workdir import read_config
from lm2_jax.types import Array, State

PIECE_SEGMENTS = 8  # segments given to one call while a text is long enough

Absorb = Callable[[Any, State, np.ndarray, State, np.ndarray], tuple[Array, State]]
LayoutOf = Callable[[RunConfig], Layout]
"""Gives the devices of a run; `sharding` implements it, and the program that starts an evaluation passes it on."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text and a question about it. Tokens are made at first use, so a set of prompts need not fit into memory.

    Training text has one blank between words and a blank before each sentence, so line breaks become blanks. The
    marker that precedes an answer in training follows the question. Without a question, the text is taken as it is.
    """

    tokenizer: Tokenizer
    context: str
    question: str | None = None

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """[S] token ids."""
        if self.question is None:
            return token_array(self.tokenizer, self.context).astype(np.int32)
        context = " ".join(self.context.split())
        ids = token_array(self.tokenizer, f" {context}" if context else "")
        question = Encoder(self.tokenizer).question(self.question)
        return np.concatenate([ids.astype(np.int32), np.array(question, np.int32)])


@runtime_checkable  # so that the annotations can be checked in tests
class Answerer(Protocol):
    """Whatever answers prompts: a trained run, or something built around one."""

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int, rows: int | None = None) -> list[str]:
        """The answers to one batch of prompts.

        Args:
          prompts: read at the same time.
          max_new_tokens: maximum length of an answer.
          rows: batch size to pad to, so that batches of several sizes share one compiled program.
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
      absorb: reads tokens into a state, see `lm2_jax.streaming.absorb`.
    """

    def __init__(self, run: Run, layout: Layout | None = None, workdir: str = "", absorb: Absorb = streaming.absorb):
        self.run, self.layout, self.workdir, self._absorb = run, layout, workdir, absorb
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

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int, rows: int | None = None) -> list[str]:
        """Repeats the most likely next token after each prompt; see `Answerer.answer`.

        Raises:
          ValueError: an empty prompt, or a size below 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if empty := [number for number, prompt in enumerate(prompts) if not len(prompt.tokens)]:
            raise ValueError(f"prompts {empty} are empty; a model answers after at least one token")
        if not prompts:
            return []
        rows = self._divisible(max(rows or 0, len(prompts)))
        batch = [prompt.tokens for prompt in prompts] + [np.zeros(0, np.int32)] * (rows - len(prompts))
        with self._context():
            last_BV, state = self._read(batch)
            is_open_B = np.arange(rows) < len(prompts)  # padding rows are last
            ids = self._generate(last_BV, state, is_open_B, max_new_tokens)
        return [self.run.tokenizer.decode(row) for row in ids[: len(prompts)]]

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
        """[B S] the most likely token at each position of a batch."""
        rows = self._divisible(batch.tokens.shape[0])
        padded = Example(*(np.pad(a, [(0, rows - len(a)), *[(0, 0)] * (a.ndim - 1)]) for a in batch))
        document = padded.document if self.run.config.data.source.packs else None
        with self._context():
            _, predicted_BS, _ = self._score(
                padded.tokens, padded.targets, self._start_of(rows), padded.reset, padded.valid, document
            )
            return self._on_host(predicted_BS)[: len(batch.tokens)]

    def _score(self, tokens: Any, targets: Any, state: Any, reset: Any, valid: Any, document: Any) -> Any:
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

    def _read(self, batch: Sequence[np.ndarray]) -> tuple[Array, State]:
        """Reads the prompts; returns the logits after the last token of each row, and the state."""
        run, state, last_BV, start = self.run, self._start_of(len(batch)), None, 0
        for size in _pieces(max(map(len, batch)), run.model.config.segment_tokens):
            tokens_BS, valid_BS = _piece(batch, len(batch), start, size, run.tokenizer.pad_id)
            logits_BV, state = self._absorb(run.model, run.params, tokens_BS, state, valid_BS)
            # A row that ended in an earlier piece keeps its logits.
            last_BV = logits_BV if last_BV is None else _keep(logits_BV, last_BV, jnp.asarray(valid_BS[:, 0]))
            start += size
        assert last_BV is not None  # the longest prompt has a token
        return last_BV, state

    def _generate(self, last_BV: Array, state: State, is_open_B: np.ndarray, max_new_tokens: int) -> list[list[int]]:
        """The tokens that follow in the rows of `is_open_B`, up to the one that ends a document."""
        run = self.run
        ids: list[list[int]] = [[] for _ in is_open_B]
        for count in range(max_new_tokens):
            token_B = self._on_host(_largest(last_BV))
            is_open_B = is_open_B & (token_B != run.tokenizer.eos_id)
            for row in np.flatnonzero(is_open_B):
                ids[row].append(int(token_B[row]))
            if not is_open_B.any() or count + 1 == max_new_tokens:
                break
            last_BV, state = self._absorb(run.model, run.params, token_B[:, None], state, is_open_B[:, None])
        return ids


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


@jax.jit
def _keep(new_BV: Array, old_BV: Array, has_new_B: Array) -> Array:
    return jnp.where(has_new_B[:, None], new_BV, old_BV)


@jax.jit
def _largest(logits_BV: Array) -> Array:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
