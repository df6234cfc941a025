"""Greedy answers of a model that reads its prompts as a stream: memory does not grow with their length."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax import streaming
from lm2_jax.data.base import Tokenizer
from lm2_jax.types import Array, State

PIECE_SEGMENTS = 8  # segments given to one call while a prompt is long enough

Absorb = Callable[[Any, State, np.ndarray, State, np.ndarray], tuple[Array, State]]


def greedy(
    model: Any,
    params: State,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_rows: int = 32,
    absorb: Absorb = streaming.absorb,
) -> list[str]:
    """The most likely next token, again and again, after each prompt.

    Prompts of similar length are read side by side, in pieces of whole segments, each padded to one of two sizes;
    so nothing recompiles, and the device holds a piece and the state, never a prompt.

    Args:
      model: what `lm2_jax.build_model` gives.
      params: its parameters.
      tokenizer: gives the token that ends an answer, and the text.
      prompts: token ids, at least one each.
      max_new_tokens: most tokens of an answer.
      batch_rows: most prompts read side by side.
      absorb: reads tokens into a state, see `lm2_jax.streaming.absorb`.
    Returns:
      The text of each answer, without the token that ends it, in the order of the prompts.
    Raises:
      ValueError: for an empty prompt, or sizes below 1.
    """
    if max_new_tokens < 1 or batch_rows < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} and batch_rows={batch_rows} must be at least 1")
    if empty := [number for number, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"prompts {empty} are empty; a model answers after at least one token")
    if not prompts:
        return []
    batches = -(-len(prompts) // batch_rows)
    rows = -(-len(prompts) // batches)  # as even as can be: the same number of batches, less padding
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        batch = [prompts[number] for number in chosen] + [()] * (rows - len(chosen))
        last_BV, state = _read(model, params, tokenizer.pad_id, batch, absorb)
        going_B = np.arange(rows) < len(chosen)  # rows without a prompt stand at the end
        ids = _answer(model, params, tokenizer.eos_id, last_BV, state, going_B, max_new_tokens, absorb)
        for number, row in zip(chosen, ids, strict=False):
            answers[number] = tokenizer.decode(row)
    return answers


def _read(
    model: Any, params: State, pad_id: int, batch: Sequence[Sequence[int]], absorb: Absorb
) -> tuple[Array, State]:
    """Reads the prompts; gives the logits after each row's last token, and the state."""
    state = model.init_state(len(batch))
    last_BV = None
    start = 0
    for size in _pieces(max(map(len, batch)), model.config.segment_tokens):
        tokens_BS = np.full((len(batch), size), pad_id, np.int32)
        valid_BS = np.zeros((len(batch), size), bool)
        for row, prompt in enumerate(batch):
            piece = prompt[start : start + size]
            tokens_BS[row, : len(piece)] = piece
            valid_BS[row, : len(piece)] = True
        logits_BV, state = absorb(model, params, tokens_BS, state, valid_BS)
        # A row that ended in an earlier piece keeps the logits it had.
        last_BV = logits_BV if last_BV is None else _keep(logits_BV, last_BV, jnp.asarray(valid_BS[:, 0]))
        start += size
    assert last_BV is not None  # the longest prompt has a token
    return last_BV, state


def _pieces(length: int, segment_tokens: int) -> list[int]:
    """Sizes of the pieces that cover `length` tokens: large ones, then single segments."""
    large = PIECE_SEGMENTS * segment_tokens
    count, rest = divmod(length, large)
    return [large] * count + [segment_tokens] * -(-rest // segment_tokens)


@jax.jit
def _keep(new_BV: Array, old_BV: Array, has_new_B: Array) -> Array:
    return jnp.where(has_new_B[:, None], new_BV, old_BV)


@jax.jit
def _largest(logits_BV: Array) -> Array:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def _answer(
    model: Any,
    params: State,
    eos_id: int,
    last_BV: Array,
    state: State,
    going_B: np.ndarray,
    max_new_tokens: int,
    absorb: Absorb,
) -> list[list[int]]:
    """The tokens that follow in the rows of `going_B`, up to the one that ends an answer."""
    ids: list[list[int]] = [[] for _ in going_B]
    for count in range(max_new_tokens):
        token_B = np.asarray(_largest(last_BV))
        going_B = going_B & (token_B != eos_id)
        for row in np.flatnonzero(going_B):
            ids[row].append(int(token_B[row]))
        if not going_B.any() or count + 1 == max_new_tokens:
            break
        last_BV, state = absorb(model, params, token_B[:, None], state, going_B[:, None])
    return ids
