"""The train state: everything a run carries from step to step, and the sharding of each of its arrays."""

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
from lm2_jax.parameters import describe, init_parameters
from lm2_jax.training.optim import make_optimizer, merge, select, trainable, tree_at_least_float32
from lm2_jax.types import Array, Int, PyTree


class TrainState(NamedTuple):
    """What a checkpoint holds.

    No random key is in it: nothing in a step is drawn, and initial parameters follow from `train.seed`.
    """

    step: Int[Array, ""]  # optimizer steps done
    params: PyTree
    opt_state: PyTree  # of trained parameters only
    memory: PyTree  # the model's state after the last step if `data.carry_state`, else None
    averaged: PyTree = None  # moving average of trained parameters, in float32 or wider, if `optim.ema_decay`


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run before its first array exists.

    Attributes:
      config: of the run.
      model: its model.
      optimizer: on the trained parameters, with None in the place of frozen ones.
      parameters: declaration of each parameter.
      trainable: for each parameter, whether it is trained.
      shapes: of the train state.
      axes: logical axes of the train state.
      memory_axes: logical axes of the model's state.
    """

    config: RunConfig
    model: LanguageModel
    optimizer: optax.GradientTransformation
    parameters: PyTree
    trainable: PyTree
    shapes: TrainState
    axes: TrainState
    memory_axes: PyTree

    @property
    def step_model(self) -> LanguageModel:
        """The model of a step: with full attention, rows that begin anew keep keys of a row, not of `max_tokens`."""
        config, decoder = self.model.config, self.model.config.decoder
        if decoder.max_tokens is None or self.config.data.carry_state:
            return self.model
        longest = max(self.config.data.segments) * config.segment_tokens
        decoder = dataclasses.replace(decoder, max_tokens=min(decoder.max_tokens, longest))
        return LanguageModel(dataclasses.replace(config, decoder=decoder))

    def shardings(self, layout: Layout) -> TrainState:
        """The sharding of each array of the train state.

        Raises:
          UserError: some devices would do no work of their own.
        """
        layout.check_used((self.axes, self.memory_axes, ("batch",)))
        return layout.shardings(self.axes, self.shapes)

    def init(self, layout: Layout) -> TrainState:
        """The state before the first step, created in its sharding; to be called in the layout's context."""

        def first() -> TrainState:
            return self.first_state(self.first_params())

        return jax.jit(first, out_shardings=self.shardings(layout))()

    def first_params(self) -> PyTree:
        """The initial parameters, which follow from `train.seed`."""
        return _unbox(_first_params(self.config, self.model))

    def first_state(self, params: PyTree) -> TrainState:
        """The state before the first step with these parameters; optimizer and memory are at their start."""
        return _first_state(self.config, self.model, self.optimizer, self.trainable, params)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Raises a `UserError` for each ValueError of the model inside: a field of the run has to change."""
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
      UserError: the model refuses its segments, or a selector of `optim` matches no parameter.
    """
    with refusals():
        params = jax.eval_shape(lambda: _first_params(config, model))  # in boxes that declare them
    parameters = describe(params)
    mask = trainable(parameters, config.optim)
    optimizer = make_optimizer(config.optim, config.model.precision, select(mask, parameters))
    boxed = jax.eval_shape(lambda params: _first_state(config, model, optimizer, mask, params), params)
    memory_axes = model.state_axes()
    axes = axes_of(boxed)._replace(memory=memory_axes if config.data.carry_state else None)
    return Plan(config, model, optimizer, parameters, mask, _unbox(boxed), axes, memory_axes)


def evaluation_params(state: TrainState) -> PyTree:
    """The parameters to evaluate: their moving average where one is kept, in the parameters' type."""
    return state.params if state.averaged is None else with_average(state.params, state.averaged)


def with_average(params: PyTree, averaged: PyTree) -> PyTree:
    """`params`, with the trained ones replaced by their moving average."""
    return jax.tree.map(lambda p, new: new.astype(p.dtype), params, merge(averaged, params))


def _first_params(config: RunConfig, model: LanguageModel) -> PyTree:
    """Parameters in the boxes that declare them."""
    tokens_BT = jnp.zeros((1, config.model.segment_tokens), jnp.int32)

    def init() -> PyTree:
        return model.init(jax.random.key(config.train.seed), tokens_BT, model.init_state(1))["params"]

    with partition.use(None):  # only the parameters of this call are kept, and no mesh divides its single row
        return init_parameters(init)


def _first_state(
    config: RunConfig, model: LanguageModel, optimizer: optax.GradientTransformation, mask: PyTree, params: PyTree
) -> TrainState:
    """The state before the first step; boxed if `params` are."""
    memory = model.init_state(config.data.rows) if config.data.carry_state else None
    active = select(mask, params)
    averaged = tree_at_least_float32(active) if config.optim.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(active), memory, averaged)


def _unbox(tree: PyTree) -> PyTree:
    """The arrays without their boxes; unlike `nn.unbox`, it adds no sharding constraints."""

    def bare(leaf: Any) -> Any:
        if isinstance(leaf, meta.Partitioned):
            return leaf.unbox(apply_constraint=False)
        return leaf

    return jax.tree.map(bare, tree, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))
