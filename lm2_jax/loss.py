"""Cross-entropy from hidden states, computed in chunks so that the logits of a full row never exist at once."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm2_jax.model import LanguageModel
from lm2_jax.precision import at_least_float32
from lm2_jax.types import Array, Float, Int


class TokenTerms(NamedTuple):
    """What the loss needs to know about each position."""

    loss_BS: Float[Array, "B S"]  # -log softmax(logits)[target]
    predicted_BS: Int[Array, "B S"]  # most likely token
    log_normalizer_BS: Float[Array, "B S"]  # log sum exp(logits)


def token_losses(
    model: LanguageModel,
    params: Any,
    hidden_BSD: Float[Array, "B S D"],
    targets_BS: Int[Array, "B S"],
    time_chunk: int,
) -> tuple[Float[Array, "B S"], Int[Array, "B S"]]:
    """The loss and the most likely token of every position; see `token_terms`."""
    return token_terms(model, params, hidden_BSD, targets_BS, time_chunk)[:2]


def token_terms(
    model: LanguageModel,
    params: Any,
    hidden_BSD: Float[Array, "B S D"],
    targets_BS: Int[Array, "B S"],
    time_chunk: int,
) -> TokenTerms:
    """The terms of the loss at every position.

    Runs over chunks of time with rematerialisation: in float32, the logits of 8,192 tokens over a vocabulary of 128k
    would take 4.2 GB per row.

    Args:
      model: whose head is used.
      params: its parameters.
      hidden_BSD: `forward(...).hidden`.
      targets_BS: token to predict at each position.
      time_chunk: largest number of positions in one chunk.
    Returns:
      [B S] arrays; the floating-point ones in float32 or wider.
    """

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(hidden_BCD: Array, targets_BC: Array) -> TokenTerms:
        logits_BCV: Any = model.apply({"params": params}, hidden_BCD, method="logits")
        logits_BCV = logits_BCV.astype(at_least_float32(logits_BCV.dtype))
        norm_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
        return TokenTerms(norm_BC - target_BC, logits_BCV.argmax(axis=-1).astype(jnp.int32), norm_BC)

    B, S, D = hidden_BSD.shape
    chunks = -(-S // time_chunk)
    if chunks == 1:
        return chunk(hidden_BSD, targets_BS)
    size = -(-S // chunks)
    pad = chunks * size - S
    hidden_JBCD = jnp.pad(hidden_BSD, ((0, 0), (0, pad), (0, 0))).reshape(B, chunks, size, D).swapaxes(0, 1)
    targets_JBC = jnp.pad(targets_BS, ((0, 0), (0, pad))).reshape(B, chunks, size).swapaxes(0, 1)
    _, terms_JBC = jax.lax.scan(lambda carry, inputs: (carry, chunk(*inputs)), None, (hidden_JBCD, targets_JBC))
    return jax.tree.map(lambda x_JBC: x_JBC.swapaxes(0, 1).reshape(B, -1)[:, :S], terms_JBC)
