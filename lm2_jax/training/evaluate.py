"""Loss and accuracy on held-out examples, by distance, during training."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lm2_jax.data.base import Example, Source
from lm2_jax.data.pipeline import batches
from lm2_jax.layout import Layout, replicated
from lm2_jax.training.objective import evaluate_batch, means
from lm2_jax.training.state import Plan
from lm2_jax.types import PyTree


def host_batches(plan: Plan, source: Source, layout: Layout, start_step: int = 0, held_out: bool = False) -> Any:
    """This process's rows of each step's batch; held-out batches always have the segments of the last stage."""
    config = plan.config.data
    if held_out:
        config = dataclasses.replace(config, segments=config.segments[-1:], stage_steps=(), vary_segments=False)
    first, rows = layout.rows_of_process(config.rows)
    return batches(
        config,
        source,
        start_step=start_step,
        process_index=first // rows,
        process_count=config.rows // rows,
        held_out=held_out,
    )


def make_evaluate(plan: Plan, source: Source, layout: Layout) -> Callable[[PyTree], dict[str, float]]:
    """The evaluation of a run: parameters -> `eval_loss`, `eval_answer_accuracy`, `eval_accuracy_d<distance>` ...

    It reads the same `train.eval_batches` batches every time. Each begins with an initial state or, where a run
    carries its state from step to step, with the state after the batch before. Called inside the layout's context.
    """
    model, rows = plan.step_model, plan.config.data.rows
    # Read now, so that a source without held-out examples is refused before training begins.
    held_out = list(itertools.islice(host_batches(plan, source, layout, held_out=True), plan.config.train.eval_batches))
    shapes = jax.eval_shape(lambda: model.init_state(rows))
    placed = layout.shardings(plan.memory_axes, shapes)
    initial = jax.jit(lambda: model.init_state(rows), out_shardings=placed)

    @functools.partial(jax.jit, out_shardings=(replicated(layout), placed))
    def run(params: PyTree, memory: PyTree, batch: Example) -> tuple[PyTree, PyTree]:
        return evaluate_batch(model, plan.config, params, memory, batch)[:2]

    def evaluate(params: PyTree) -> dict[str, float]:
        memory, totals = initial(), {}
        for batch in held_out:
            sums, after = run(params, memory, layout.batch(batch))
            memory = after if plan.config.data.carry_state else memory
            for name, value in jax.device_get(sums).items():
                totals[name] = totals.get(name, np.zeros(2)) + value
        return {f"eval_{name}": value for name, value in means(totals).items()}

    return evaluate
