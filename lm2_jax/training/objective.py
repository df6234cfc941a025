"""What is minimised and what is counted: both as sums, so that micro-batches, steps and hosts simply add up."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax.config import RunConfig
from lm2_jax.data.base import Example
from lm2_jax.loss import token_losses
from lm2_jax.model import LanguageModel
from lm2_jax.types import Array, Bool, Float, Int, PyTree, State

# Distance from an answer to the latest mention of its fact, in segments; each bucket ends where the next begins.
DISTANCES = (0, 1, 2, 4, 8)

Tally = dict[str, Float[Array, "2"]]  # by name: a sum, and the weight to divide it by


def batch_shapes(rows: int, segments: int, segment_tokens: int) -> Example:
    """Shapes and types of a batch."""
    whole, bits = (jax.ShapeDtypeStruct((rows, segments * segment_tokens), kind) for kind in (np.int32, np.bool_))
    reset = jax.ShapeDtypeStruct((rows, segments), np.bool_)
    return Example(whole, whole, bits, bits, bits, reset, whole, whole)  # pyright: ignore[reportArgumentType]


def loss_weights(batch: Example, config: RunConfig) -> Float[Array, "B S"]:
    """Weight of each position: answers and text, each by its own, padding 0."""
    answer_BS, text_BS, valid_BS = map(jnp.asarray, (batch.answer, batch.text, batch.valid))
    text_weight_BS = jnp.where(text_BS, config.loss.text_weight, 0.0)
    return jnp.where(valid_BS, jnp.where(answer_BS, config.loss.answer_weight, text_weight_BS), 0.0)


def tally(
    batch: Example,
    weight_BS: Float[Array, "B S"],
    loss_BS: Float[Array, "B S"],
    predicted_BS: Int[Array, "B S"],
) -> Tally:
    """Sums and weights of all that is reported about a batch."""
    right_BS = predicted_BS == jnp.asarray(batch.targets)
    answer_BS, text_BS, valid_BS = map(jnp.asarray, (batch.answer, batch.text, batch.valid))
    answer_BS, text_BS = answer_BS & valid_BS, text_BS & ~answer_BS & valid_BS
    distance_BS = jnp.asarray(batch.distance)

    def mean_over(mask_BS: Bool[Array, "B S"], value_BS: Array) -> Float[Array, "2"]:
        value_BS = jnp.where(mask_BS, value_BS.astype(jnp.float32), 0.0)
        return jnp.stack([jnp.sum(value_BS), jnp.sum(mask_BS, dtype=jnp.float32)])

    sums = {
        "loss": jnp.stack([jnp.sum(weight_BS * loss_BS), jnp.sum(weight_BS)]).astype(jnp.float32),
        "answer_loss": mean_over(answer_BS, loss_BS),
        "text_loss": mean_over(text_BS, loss_BS),
        "answer_accuracy": mean_over(answer_BS & (distance_BS >= 0), right_BS),  # without end tokens
    }
    for first, after in zip(DISTANCES, (*DISTANCES[1:], np.iinfo(np.int32).max), strict=True):
        here_BS = answer_BS & (distance_BS >= first) & (distance_BS < after)
        sums[f"accuracy_d{first}"] = mean_over(here_BS, right_BS)
    return sums


def means(sums: Mapping[str, Any]) -> dict[str, float]:
    """Sum over weight, where there is any: what has not occurred is left out."""
    return {name: float(total) / float(weight) for name, (total, weight) in sums.items() if weight > 0}


def evaluate_batch(
    model: LanguageModel, config: RunConfig, params: PyTree, memory: State, batch: Example, key: Array | None = None
) -> tuple[Tally, State, PyTree]:
    """Runs the model over a batch.

    Args:
      model: as `lm2_jax.build_model` gives it.
      config: of the run.
      params: parameters.
      memory: state before the batch's first segment.
      batch: rows in front.
      key: for layers that draw random numbers; None in evaluation.
    Returns:
      The tally, whose "loss" is the differentiable one; the state after the batch; the model's diagnostics.
    """
    out: Any = model.apply(
        {"params": params},
        batch.tokens,
        memory,
        batch.reset,
        batch.valid,
        method="forward",
        document=batch.document if config.data.source.packs else None,
        bptt_segments=config.train.bptt_segments,
        rngs=None if key is None else {"dropout": key},
    )
    loss_BS, predicted_BS = token_losses(model, params, out.hidden, jnp.asarray(batch.targets), config.loss.time_chunk)
    return tally(batch, loss_weights(batch, config), loss_BS, predicted_BS), out.state, jax.lax.stop_gradient(out.aux)
