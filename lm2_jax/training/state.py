"""Everything a run carries from step to step, and where each array of it lies."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.core import meta

from lm2_jax import partition
from lm2_jax.config import RunConfig
from lm2_jax.errors import UserError
from lm2_jax.layout import Layout, axes_of
from lm2_jax.model import LanguageModel
from lm2_jax.training.optim import make_optimizer
from lm2_jax.types import Array, Int, PyTree


class TrainState(NamedTuple):
    """What a checkpoint holds."""

    step: Int[Array, ""]  # optimizer steps done
    params: PyTree
    opt_state: PyTree
    memory: PyTree  # the model's state after the last step where it is carried on, else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run before its first array exists: the model, the optimizer, and the train state's shapes and axes."""

    config: RunConfig
    model: LanguageModel
    optimizer: optax.GradientTransformation
    shapes: TrainState
    axes: TrainState
    memory_axes: PyTree

    def shardings(self, layout: Layout) -> TrainState:
        """Where each array of the train state lies; raises UserError where some devices would have nothing to do."""
        layout.check_used((self.axes, self.memory_axes, ("batch",)))
        return layout.shardings(self.axes, self.shapes)

    def init(self, layout: Layout) -> TrainState:
        """The state before the first step, made where it lies; called inside the layout's context."""

        def first() -> TrainState:
            return self._first_state(_unbox(_first_params(self.config, self.model)))

        return jax.jit(first, out_shardings=self.shardings(layout))()

    def _first_state(self, params: PyTree) -> TrainState:
        return _first_state(self.config, self.model, self.optimizer, params)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What the model refuses inside it is a `UserError`: a field of the run has to change."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"This run cannot be trained: {error}") from error


def make_plan(config: RunConfig, model: LanguageModel) -> Plan:
    """Plans a run; nothing is computed.

    Args:
      config: of the run.
      model: `lm2_jax.build_model(config.model)`.
    Raises:
      UserError: the model refuses its segments.
    """
    with refusals():
        params = jax.eval_shape(lambda: _first_params(config, model))  # in boxes that name their axes
    optimizer = make_optimizer(config, axes_of(params))
    boxed = jax.eval_shape(lambda params: _first_state(config, model, optimizer, params), params)
    memory_axes = model.state_axes()
    axes = axes_of(boxed)._replace(memory=memory_axes if config.data.carry_state else None)
    return Plan(config, model, optimizer, _unbox(boxed), axes, memory_axes)


def _first_params(config: RunConfig, model: LanguageModel) -> PyTree:
    """Parameters in the boxes that name their axes."""
    tokens_BT = jnp.zeros((1, config.model.segment_tokens), jnp.int32)
    with partition.use(None):  # nothing but parameters remains of this one row, which no mesh divides
        return model.init(jax.random.key(config.train.seed), tokens_BT, model.init_state(1))["params"]


def _first_state(
    config: RunConfig, model: LanguageModel, optimizer: optax.GradientTransformation, params: PyTree
) -> TrainState:
    """The state before the first step; boxed where `params` are."""
    memory = model.init_state(config.data.rows) if config.data.carry_state else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), memory)


def _unbox(tree: PyTree) -> PyTree:
    """The arrays without their boxes; unlike `nn.unbox`, no constraint is laid on them."""

    def bare(leaf: Any) -> Any:
        if isinstance(leaf, meta.Partitioned):
            return leaf.unbox(apply_constraint=False)
        return leaf

    return jax.tree.map(bare, tree, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
