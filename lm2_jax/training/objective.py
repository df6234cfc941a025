"""The objective and the metrics of a batch, as sums, so that micro-batches, steps and hosts can be added up."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax.config import LossConfig, RunConfig
from lm2_jax.data.base import Example
from lm2_jax.loss import token_terms
from lm2_jax.model import LanguageModel
from lm2_jax.types import Array, Bool, Float, Int, PyTree, State

# Buckets of the distance in segments from an answer to the latest mention of its fact; each ends where the next begins.
DISTANCES = (0, 1, 2, 4, 8)

MetricSums = dict[str, Float[Array, "2"]]  # by name: a weighted sum, and the sum of the weights


def batch_shapes(rows: int, segments: int, segment_tokens: int) -> Example:
    """Shapes and types of a batch."""
    numbers, bits = (jax.ShapeDtypeStruct((rows, segments * segment_tokens), kind) for kind in (np.int32, np.bool_))
    reset = jax.ShapeDtypeStruct((rows, segments), np.bool_)
    return Example(numbers, numbers, bits, bits, bits, reset, numbers, numbers)  # pyright: ignore[reportArgumentType]


def loss_weights(batch: Example, config: RunConfig) -> Float[Array, "B S"]:
    """Weight of each position in the loss: that of answers, that of text, or 0 for padding."""
    answer_BS, text_BS, valid_BS = map(jnp.asarray, (batch.answer, batch.text, batch.valid))
    text_weight_BS = jnp.where(text_BS, config.loss.text_weight, 0.0)
    return jnp.where(valid_BS, jnp.where(answer_BS, config.loss.answer_weight, text_weight_BS), 0.0)


def weighted(value_BS: Float[Array, "B S"], weight_BS: Float[Array, "B S"]) -> Float[Array, "2"]:
    """The weighted sum and the sum of the weights; a position without weight may hold NaN."""
    total = jnp.sum(jnp.where(weight_BS > 0, weight_BS * value_BS, 0.0))
    return jnp.stack([total, jnp.sum(weight_BS)]).astype(jnp.float32)


def metric_sums(
    batch: Example,
    weight_BS: Float[Array, "B S"],
    loss_BS: Float[Array, "B S"],
    predicted_BS: Int[Array, "B S"],
) -> MetricSums:
    """Sums and weights of the metrics of a batch.

    Args:
      batch: targets, kinds of positions, and distances.
      weight_BS: weight of each position in the loss.
      loss_BS: cross-entropy.
      predicted_BS: most likely token.
    """
    correct_BS = predicted_BS == jnp.asarray(batch.targets)
    answer_BS, text_BS, valid_BS = map(jnp.asarray, (batch.answer, batch.text, batch.valid))
    answer_BS, text_BS = answer_BS & valid_BS, text_BS & ~answer_BS & valid_BS
    distance_BS = jnp.asarray(batch.distance)

    def mean_over(mask_BS: Bool[Array, "B S"], value_BS: Array) -> Float[Array, "2"]:
        value_BS = jnp.where(mask_BS, value_BS.astype(jnp.float32), 0.0)
        return jnp.stack([jnp.sum(value_BS), jnp.sum(mask_BS, dtype=jnp.float32)])

    sums = {
        "loss": weighted(loss_BS, weight_BS),
        "answer_loss": mean_over(answer_BS, loss_BS),
        "text_loss": mean_over(text_BS, loss_BS),
        "answer_accuracy": mean_over(answer_BS & (distance_BS >= 0), correct_BS),  # end tokens have no distance
    }
    for first, after in zip(DISTANCES, (*DISTANCES[1:], np.iinfo(np.int32).max), strict=True):
        bucket_BS = answer_BS & (distance_BS >= first) & (distance_BS < after)
        sums[f"accuracy_d{first}"] = mean_over(bucket_BS, correct_BS)
    return sums


def means(sums: Mapping[str, Any]) -> dict[str, float]:
    """The weighted mean of each metric; metrics without any weight are left out."""
    return {name: float(total) / float(weight) for name, (total, weight) in sums.items() if weight > 0}


def evaluate_batch(
    model: LanguageModel, config: RunConfig, params: PyTree, memory: State, batch: Example
) -> tuple[MetricSums, State, PyTree]:
    """Runs the model over a batch.

    Args:
      model: `lm2_jax.build_model(config.model)`.
      config: of the run.
      params: parameters.
      memory: state before the batch's first segment.
      batch: arrays with rows first. Its `document` is used only if the source packs several documents into a segment;
        otherwise documents begin at segment borders, where `reset` marks them.
    Returns:
      The metric sums, differentiable through `objective`; the state after the batch; the model's diagnostics.
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
    )
    terms = token_terms(model, params, out.hidden, jnp.asarray(batch.targets), config.loss.time_chunk)
    weight_BS = loss_weights(batch, config)
    sums = metric_sums(batch, weight_BS, terms.loss_BS, terms.predicted_BS)
    if config.loss.z_loss:
        z_BS = jnp.square(terms.log_normalizer_BS)
        sums["z_loss"] = weighted(z_BS, weight_BS)
    return sums, out.state, jax.lax.stop_gradient(out.aux)


def objective(sums: MetricSums, config: LossConfig) -> Float[Array, ""]:
    """What is minimised, times the sum of the weights: cross-entropy and, if configured, the z-loss."""
    return sums["loss"][0] + config.z_loss * sums["z_loss"][0] if config.z_loss else sums["loss"][0]
