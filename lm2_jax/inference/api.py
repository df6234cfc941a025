"""Text in, text out: what `Run.generate` and `Run.score` call."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax import streaming
from lm2_jax.errors import UserError
from lm2_jax.inference.engine import Engine, Request
from lm2_jax.inference.sampling import Sampling
from lm2_jax.inference.snapshot import MemorySnapshot, empty_memory
from lm2_jax.model import ModelState
from lm2_jax.state import map_axes
from lm2_jax.types import Array, Float, Int

if TYPE_CHECKING:
    from lm2_jax.runs import Run


def generate(
    run: "Run",
    prompts: str | Sequence[str],
    memory: MemorySnapshot | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 8,
) -> list[str]:
    """Continues each prompt.

    Args:
      run: a trained run.
      prompts: the texts to continue.
      memory: what was read before each prompt; it is only read. None: nothing.
      max_new_tokens: most tokens of an answer.
      temperature: as the other options of sampling, see `Sampling`; 0: the most likely token.
      top_k: see `Sampling`.
      top_p: see `Sampling`.
      min_p: see `Sampling`.
      repetition_penalty: see `Sampling`.
      stop: an answer ends before the first of these strings.
      seed: same seed, same texts, for any batch size.
      batch_size: prompts that are processed at the same time.
    Returns:
      The text after each prompt, in the order of the prompts.
    Raises:
      UserError: a memory of another model or tokenizer, an empty prompt without a memory, or an impossible option.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: expected a number of at least 1")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    requests = (
        Request(np.array(run.tokenizer.encode(prompt), np.int32), index, max_new_tokens, sampling, stop)
        for index, prompt in enumerate(prompts)
    )
    answers = [""] * len(prompts)
    if prompts:
        for piece in Engine(run, memory, batch_size).generate(requests):
            answers[piece.index] += piece.text
    return answers


def score(
    run: "Run", texts: str | Sequence[str], memory: MemorySnapshot | None = None, batch_size: int = 8
) -> list[float]:
    """log p(text | memory) of each text, summed over its tokens.

    Without a memory nothing predicts the first token of a text, so the sum begins with the second.

    Args:
      run: a trained run.
      texts: the texts.
      memory: what was read before each text; it is only read. None: nothing.
      batch_size: texts that are processed at the same time.
    Raises:
      UserError: a memory of another model or tokenizer, or an empty text.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if memory is not None:
        memory.check_run(run)
    memory = empty_memory(run) if memory is None else memory
    ids = [np.array(run.tokenizer.encode(text), np.int32) for text in texts]
    if empty := [number for number, tokens in enumerate(ids) if not len(tokens)]:
        raise UserError(f"texts {empty} are empty; only a text with a token has a score")
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    scores = [0.0] * len(ids)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        rows = [ids[number] for number in chosen] + [np.zeros(0, np.int32)] * (batch_size - len(chosen))
        for number, value in zip(chosen, _score_rows(run, rows, memory), strict=False):
            scores[number] = float(value)
    return scores


def _score_rows(run: "Run", rows: list[np.ndarray], memory: MemorySnapshot) -> np.ndarray:
    """[B] log-likelihoods of the rows' tokens, read in pieces of one segment."""
    T, model, params = run.config.model.segment_tokens, run.model, run.params
    state = _repeated(model, memory.state, len(rows))
    first_scored = max(memory.position, 0 if memory.tokens_read else 1)
    texts = [np.concatenate([memory.open_tokens, row]) if len(row) else row for row in rows]
    total_B = np.zeros(len(rows), np.float64)
    last_BV = jnp.broadcast_to(jnp.asarray(memory.logits_V), (len(rows), run.config.model.vocab_size))
    for first in range(0, max(map(len, texts)), T):
        tokens_BT, valid_BT = np.zeros((len(rows), T), np.int32), np.zeros((len(rows), T), bool)
        for index, text in enumerate(texts):
            part = text[first : first + T]
            tokens_BT[index, : len(part)], valid_BT[index, : len(part)] = part, True
        logits_BTV, state = streaming.stream(model, params, tokens_BT, state, valid_BT)
        found_BT, last_BV = _log_likelihoods(last_BV, logits_BTV, tokens_BT)
        is_scored_T = np.arange(first, first + T) >= first_scored
        total_B += np.where(valid_BT & is_scored_T, np.asarray(found_BT), 0).sum(axis=1, dtype=np.float64)
    return total_B


@functools.partial(jax.jit, static_argnums=(0, 2))
def _repeated(model: Any, state: ModelState, rows: int) -> ModelState:
    """A state of one row for many."""
    return map_axes(lambda names, leaf: jnp.repeat(leaf, rows, axis=names.index("batch")), model.state_axes(), state)


@jax.jit
def _log_likelihoods(
    before_BV: Float[Array, "B V"], logits_BTV: Float[Array, "B T V"], tokens_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B V"]]:
    """log p of each token given those before it, and the logits after the last one."""
    predicted_BTV = jnp.concatenate([before_BV[:, None], logits_BTV[:, :-1]], axis=1)
    chosen_BT = jnp.take_along_axis(predicted_BTV, tokens_BT[:, :, None], axis=-1)[:, :, 0]
    return chosen_BT - jax.nn.logsumexp(predicted_BTV, axis=-1), logits_BTV[:, -1]
