"""One optimizer step as a pure function; gradients are accumulated over micro-batches by a scan."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm2_jax.data.base import Example
from lm2_jax.layout import Layout, replicated
from lm2_jax.state import map_axes
from lm2_jax.training.objective import MetricSums, evaluate_batch, loss_weights, objective
from lm2_jax.training.optim import learning_rate, merge, select, tree_at_least_float32
from lm2_jax.training.state import Plan, TrainState
from lm2_jax.types import Array, Axes, Float, PyTree


class Report(NamedTuple):
    """Metrics of one step; the host reads them while the next step runs."""

    tally: MetricSums
    grad_norm: Float[Array, ""]  # before clipping, of the trained parameters
    learning_rate: Float[Array, ""]
    aux: PyTree  # the model's diagnostics, a mean over micro-batches


def make_train_step(plan: Plan) -> Callable[[TrainState, Example], tuple[TrainState, Report]]:
    """The step of a run: (state, global batch) -> (state, report).

    The loss is sum(w * ce) / sum(w) over the global batch, whatever the number of micro-batches.
    """
    config, model, micro_batches = plan.config, plan.step_model, plan.config.optim.accumulate

    def train_step(state: TrainState, batch: Example) -> tuple[TrainState, Report]:
        memory = state.memory if config.data.carry_state else model.init_state(batch.tokens.shape[0])
        total = jnp.maximum(jnp.sum(loss_weights(batch, config)), jnp.finfo(jnp.float32).tiny)
        active = select(plan.trainable, state.params)

        def loss(active: PyTree, micro: Example, memory: PyTree) -> tuple[Array, tuple[Any, ...]]:
            params = merge(active, state.params)  # frozen parameters are constants of the gradient
            sums, after, aux = evaluate_batch(model, config, params, memory, micro)
            return objective(sums, config.loss) / total, (sums, after, aux)

        def accumulate(grads: PyTree, micro: tuple[Any, ...]) -> tuple[PyTree, tuple[Any, ...]]:
            new, rest = jax.grad(loss, has_aux=True)(active, *micro)
            return jax.tree.map(lambda total, g: total + g.astype(total.dtype), grads, new), rest

        zeros = jax.tree.map(jnp.zeros_like, tree_at_least_float32(active))
        micros = (
            jax.tree.map(lambda x: split_rows(x, 0, micro_batches), batch),
            split_state(memory, plan.memory_axes, micro_batches),
        )
        grads, (sums, after, aux) = jax.lax.scan(accumulate, zeros, micros)
        updates, opt_state = plan.optimizer.update(grads, state.opt_state, active)
        with jax.numpy_dtype_promotion("standard"):
            active = optax.apply_updates(active, updates)
        new_state = TrainState(
            state.step + 1,
            merge(active, state.params),
            opt_state,
            merge_state(after, plan.memory_axes) if config.data.carry_state else None,
            move_average(state, active, config.optim.ema_decay),
        )
        report = Report(
            jax.tree.map(lambda x: x.sum(0), sums),
            optax.tree.norm(grads),
            jnp.asarray(learning_rate(config.optim)(state.step), jnp.float32),
            jax.tree.map(lambda x: x.mean(0), aux),
        )
        return new_state, report

    return train_step


def move_average(state: TrainState, active: PyTree, decay: float) -> PyTree:
    """The moving average of the parameters after a step, or None where none is kept.

    The decay is min(decay, (1 + step) / (10 + step)), so that the initial parameters are soon forgotten.

    Args:
      state: before the step.
      active: trained parameters after the step.
      decay: `optim.ema_decay`.
    """
    if state.averaged is None:
        return None
    step = state.step.astype(jnp.float32)
    share = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(
        lambda old, new: old + share.astype(old.dtype) * (new - old), state.averaged, tree_at_least_float32(active)
    )


def jit_train_step(plan: Plan, layout: Layout) -> Any:
    """`make_train_step`, jitted; the state is donated and keeps its sharding.

    The report is replicated on every device, so that each process can read it.
    """
    out = (plan.shardings(layout), replicated(layout))
    return jax.jit(make_train_step(plan), donate_argnums=0, out_shardings=out)


def split_rows(x: Array, axis: int, count: int) -> Array:
    """Splits one dimension into micro-batches, along a new first dimension; row r belongs to micro-batch r % count.

    So each micro-batch has rows of every device, and no row has to move.
    """
    shape = (*x.shape[:axis], x.shape[axis] // count, count, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis + 1, 0)


def merge_rows(micro_batches: Array, axis: int) -> Array:
    """The inverse of `split_rows`."""
    x = jnp.moveaxis(micro_batches, 0, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def split_state(memory: PyTree, axes: PyTree, count: int) -> PyTree:
    """`split_rows` along the batch of each array of a state."""
    return map_axes(lambda names, x: split_rows(x, _batch(names), count), axes, memory)


def merge_state(micro_batches: PyTree, axes: PyTree) -> PyTree:
    """`merge_rows` along the batch of each array of a state."""
    return map_axes(lambda names, x: merge_rows(x, _batch(names)), axes, micro_batches)


def _batch(names: Axes) -> int:
    return names.index("batch")
