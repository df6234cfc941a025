"""One optimizer step as a pure function; gradient accumulation is a scan, also over a single micro-batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm2_jax.data.base import Example
from lm2_jax.layout import Layout, whole
from lm2_jax.state import map_axes
from lm2_jax.training.objective import Tally, evaluate_batch, loss_weights
from lm2_jax.training.optim import learning_rate, widen
from lm2_jax.training.state import Plan, TrainState
from lm2_jax.types import Array, Axes, Float, PyTree


class Report(NamedTuple):
    """What a step tells about itself; read by the host one step later."""

    tally: Tally
    grad_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]
    aux: PyTree  # the model's diagnostics


def make_train_step(plan: Plan) -> Callable[[TrainState, Example], tuple[TrainState, Report]]:
    """The step of a run: (state, global batch) -> (state, report).

    The loss is sum(w * ce) / sum(w) over the global batch, in however many micro-batches it is computed.
    """
    config, model, parts = plan.config, plan.model, plan.config.optim.accumulate

    def train_step(state: TrainState, batch: Example) -> tuple[TrainState, Report]:
        memory = state.memory if config.data.carry_state else model.init_state(batch.tokens.shape[0])
        total = jnp.maximum(jnp.sum(loss_weights(batch, config)), jnp.finfo(jnp.float32).tiny)

        def loss(params: PyTree, micro: Example, memory: PyTree) -> tuple[Array, tuple[Any, ...]]:
            sums, after, aux = evaluate_batch(model, config, params, memory, micro)
            return sums["loss"][0] / total, (sums, after, aux)

        def accumulate(grads: PyTree, micro: tuple[Any, ...]) -> tuple[PyTree, tuple[Any, ...]]:
            new, rest = jax.grad(loss, has_aux=True)(state.params, *micro)
            return jax.tree.map(lambda total, g: total + g.astype(total.dtype), grads, new), rest

        zeros = jax.tree.map(jnp.zeros_like, widen(state.params))
        micros = (
            jax.tree.map(lambda x: cut(x, 0, parts), batch),
            cut_rows(memory, plan.memory_axes, parts),
        )
        grads, (sums, after, aux) = jax.lax.scan(accumulate, zeros, micros)
        updates, opt_state = plan.optimizer.update(grads, state.opt_state, state.params)
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(state.params, updates)
        memory = join_rows(after, plan.memory_axes) if config.data.carry_state else None
        report = Report(
            jax.tree.map(lambda x: x.sum(0), sums),
            optax.tree.norm(grads),
            jnp.asarray(learning_rate(config.optim)(state.step), jnp.float32),
            jax.tree.map(lambda x: x.mean(0), aux),
        )
        return TrainState(state.step + 1, params, opt_state, memory), report

    return train_step


def jit_train_step(plan: Plan, layout: Layout) -> Any:
    """`make_train_step`, jitted: the state is donated, and lies behind the step where it lay before.

    The report lies whole on every device, so that each process can read it.
    """
    out = (plan.shardings(layout), whole(layout))
    return jax.jit(make_train_step(plan), donate_argnums=0, out_shardings=out)


def cut(x: Array, axis: int, parts: int) -> Array:
    """`x` as `parts` pieces along a new first dimension; row r goes to piece r % parts.

    So every piece has rows of every device, and none has to move.
    """
    shape = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis + 1, 0)


def join(pieces: Array, axis: int) -> Array:
    """What `cut` cut."""
    x = jnp.moveaxis(pieces, 0, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def cut_rows(memory: PyTree, axes: PyTree, parts: int) -> PyTree:
    """`cut` along the batch of each array of a state."""
    return map_axes(lambda names, x: cut(x, _batch(names), parts), axes, memory)


def join_rows(pieces: PyTree, axes: PyTree) -> PyTree:
    """`join` along the batch of each array of a state."""
    return map_axes(lambda names, x: join(x, _batch(names)), axes, pieces)


def _batch(names: Axes) -> int:
    return names.index("batch")
