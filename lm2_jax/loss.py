"""Cross-entropy from hidden states, without the logits of a whole row."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm2_jax.model import LanguageModel
from lm2_jax.precision import safe
from lm2_jax.types import Array, Float, Int


def token_losses(
    model: LanguageModel,
    params: Any,
    hidden_BSD: Float[Array, "B S D"],
    targets_BS: Int[Array, "B S"],
    time_chunk: int,
) -> tuple[Float[Array, "B S"], Int[Array, "B S"]]:
    """-log softmax(logits)[target] at every position.

    Runs over chunks of time under rematerialisation: logits of 8,192 tokens over a vocabulary of 128k would take
    4.2 GB a row in float32.

    Args:
      model: whose head is used.
      params: its parameters.
      hidden_BSD: `forward(...).hidden`.
      targets_BS: token to predict at each position.
      time_chunk: positions of one chunk at most.
    Returns:
      [B S] loss in float32 at least, and the [B S] most likely token.
    """

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(hidden_BCD: Array, targets_BC: Array) -> tuple[Array, Array]:
        logits_BCV: Any = model.apply({"params": params}, hidden_BCD, method="logits")
        logits_BCV = logits_BCV.astype(safe(logits_BCV.dtype))
        norm_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
        return norm_BC - target_BC, logits_BCV.argmax(axis=-1).astype(jnp.int32)

    B, S, D = hidden_BSD.shape
    pieces = -(-S // time_chunk)
    if pieces == 1:
        return chunk(hidden_BSD, targets_BS)
    size = -(-S // pieces)
    pad = pieces * size - S
    hidden_JBCD = jnp.pad(hidden_BSD, ((0, 0), (0, pad), (0, 0))).reshape(B, pieces, size, D).swapaxes(0, 1)
    targets_JBC = jnp.pad(targets_BS, ((0, 0), (0, pad))).reshape(B, pieces, size).swapaxes(0, 1)
    _, (losses_JBC, best_JBC) = jax.lax.scan(
        lambda carry, piece: (carry, chunk(*piece)), None, (hidden_JBCD, targets_JBC)
    )
    return tuple(a.swapaxes(0, 1).reshape(B, -1)[:, :S] for a in (losses_JBC, best_JBC))  # pyright: ignore
