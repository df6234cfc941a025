"""What a run minimises and how: loss, optimizer and learning-rate schedule as frozen dataclasses.

A selector chooses parameters by role (`gate`), by group (`memory`, `lora`, or `decoder`: all that the decoder has
without memory and adapters), by module (`blocks_0/mlp`) or by a pattern of the path (`*/attention/*`, where `*` stands
for any characters). Roles are those of `lm2_jax.parameters.Role`. Blocks of equal form are stacked into one array, so a
path chooses all of them together.
"""

import dataclasses
import math
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from lm2_jax.fields import GROWS, Checked, Range, Since
from lm2_jax.parameters import Parameter, Role
from lm2_jax.registry import Family
from lm2_jax.types import PyTree


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class LossConfig(Checked):
    """The objective: cross-entropy of answers and text, each with a weight."""

    answer_weight: float = 1.0
    """Weight of an answer token."""
    text_weight: float = 0.0
    """Weight of every other token."""
    z_loss: Annotated[float, Since(2)] = 0.0
    """Weight of the squared log-normaliser of the softmax, which keeps logits from drifting; 0: off, usual: 1e-4."""
    time_chunk: int = 2048
    """Positions whose logits are in memory at once: the loss is computed in chunks of at most this many positions, with
    rematerialisation."""

    def __post_init__(self) -> None:
        for name in ("answer_weight", "text_weight", "z_loss"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"loss.{name} must be finite and not negative, got {value}")
        _require(self.answer_weight + self.text_weight > 0, "loss: both weights are 0, nothing would be learned")
        _require(self.time_chunk >= 1, f"loss.time_chunk must be at least 1, got {self.time_chunk}")


def unweighted(loss: LossConfig) -> set[str]:
    """Metrics of tokens that no weight counts, which a person is not shown."""
    weights = {"answer_loss": loss.answer_weight, "text_loss": loss.text_weight}
    return {name for name, weight in weights.items() if weight == 0}


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Family):
    """Base of the learning-rate schedules; `optim.schedule` of a run."""

    def check(self, optim: "OptimConfig") -> None:
        """Raises ValueError if the schedule does not fit the run's steps."""

    def after_warmup(self, optim: "OptimConfig") -> optax.Schedule:
        """The rate as a function of the steps since the end of the warm-up; it begins at `optim.learning_rate`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Cosine(ScheduleConfig):
    """Half a cosine from the peak to `optim.final_fraction` of it."""

    kind: ClassVar[str] = "cosine"

    def after_warmup(self, optim: "OptimConfig") -> optax.Schedule:
        """See the base class."""
        alpha = optim.final_rate / optim.learning_rate
        return optax.cosine_decay_schedule(optim.learning_rate, optim.steps - optim.warmup_steps, alpha)


@dataclasses.dataclass(frozen=True)
class Linear(ScheduleConfig):
    """A straight line from the peak to `optim.final_fraction` of it."""

    kind: ClassVar[str] = "linear"

    def after_warmup(self, optim: "OptimConfig") -> optax.Schedule:
        """See the base class."""
        return optax.linear_schedule(optim.learning_rate, optim.final_rate, optim.steps - optim.warmup_steps)


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay(ScheduleConfig):
    """Constant at the peak, then a straight line to `optim.final_fraction` of it (arXiv:2404.06395)."""

    kind: ClassVar[str] = "wsd"
    decay_fraction: float = 0.2
    """Share of all steps that the decay takes, at the end of the run."""

    def check(self, optim: "OptimConfig") -> None:
        """See the base class."""
        decay, rest = self.decay_steps(optim), optim.steps - optim.warmup_steps
        _require(
            0 < self.decay_fraction <= 1 and decay <= rest,
            f"optim.schedule.decay_fraction={self.decay_fraction} must be above 0, and its {decay} steps must fit into "
            f"the {rest} steps after the warm-up",
        )

    def decay_steps(self, optim: "OptimConfig") -> int:
        """Steps of the decay."""
        return max(1, round(self.decay_fraction * optim.steps))

    def after_warmup(self, optim: "OptimConfig") -> optax.Schedule:
        """See the base class."""
        decay = self.decay_steps(optim)
        return optax.join_schedules(
            [
                optax.constant_schedule(optim.learning_rate),
                optax.linear_schedule(optim.learning_rate, optim.final_rate, decay),
            ],
            [optim.steps - optim.warmup_steps - decay],
        )


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig(Family):
    """Base of the optimizers; `optim.algorithm` of a run.

    Clipping, weight decay, learning rates and their schedule are common to all; an optimizer turns clipped gradients
    into updates of unit scale.
    """

    def scale(self, optim: "OptimConfig", parameters: PyTree, moments: jnp.dtype) -> optax.GradientTransformation:
        """The transformation of gradients.

        Args:
          optim: for `beta1`, `beta2` and `epsilon`, which are Adam's, also where Adam updates only some parameters.
          parameters: tree with the `Parameter` of each trained array.
          moments: type of the first moment.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class AdamW(AlgorithmConfig):
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    kind: ClassVar[str] = "adamw"

    def scale(self, optim: "OptimConfig", parameters: PyTree, moments: jnp.dtype) -> optax.GradientTransformation:
        """See the base class."""
        return optax.scale_by_adam(optim.beta1, optim.beta2, optim.epsilon, mu_dtype=moments)


@dataclasses.dataclass(frozen=True)
class Muon(AlgorithmConfig):
    """Muon for parameters of role `weight`, AdamW for all others (arXiv:2502.16982).

    A kernel of more than two dimensions is one matrix from its input to its output dimensions; stacked blocks are
    separate matrices. Embedding, head, gates, norms, biases, convolutions and learned starts are AdamW's.
    """

    kind: ClassVar[str] = "muon"
    momentum: float = 0.95
    """Decay of Muon's momentum."""
    nesterov: bool = True
    """Whether Nesterov momentum is used."""
    orthogonalize_steps: int = 5
    """Newton-Schulz iterations per step."""
    update_rms: float = 0.2
    """Root mean square of Muon's updates, in learning rates. AdamW's are near 0.2, so one learning rate fits both."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.momentum < 1, f"optim.algorithm.momentum must be at least 0 and below 1, got {self.momentum}"
        )
        _require(
            1 <= self.orthogonalize_steps <= 20,
            f"optim.algorithm.orthogonalize_steps must be between 1 and 20, got {self.orthogonalize_steps}",
        )
        _require(
            0 < self.update_rms < math.inf,
            f"optim.algorithm.update_rms must be positive and finite, got {self.update_rms}",
        )

    def scale(self, optim: "OptimConfig", parameters: PyTree, moments: jnp.dtype) -> optax.GradientTransformation:
        """See the base class."""
        # `optax.partition` shows each optimizer the tree with `MaskedNode` in the place of what is not its own.
        matrices = jax.tree.map(lambda p: matrix_dimensions(p) or optax.MaskedNode(), parameters)
        muon = optax.chain(
            contrib.scale_by_muon(
                ns_steps=self.orthogonalize_steps,
                beta=self.momentum,
                mu_dtype=moments,
                nesterov=self.nesterov,
                weight_dimension_numbers=matrices,
            ),
            optax.stateless(lambda updates, _: jax.tree.map(self._to_rms, matrices, updates, is_leaf=_is_matrix)),
        )
        labels = jax.tree.map(lambda p: "adamw" if matrix_dimensions(p) is None else "muon", parameters)
        return optax.partition({"muon": muon, "adamw": AdamW().scale(optim, parameters, moments)}, labels)

    def _to_rms(self, dims: contrib.MuonDimensionNumbers, update: jax.Array) -> jax.Array:
        """An orthogonal [in, out] update, scaled to `update_rms`: its own is 1 / sqrt(max(in, out))."""
        sizes = [math.prod(update.shape[i] for i in axes) for axes in dims]  # pyright: ignore[reportGeneralTypeIssues]
        return update * (self.update_rms * math.sqrt(max(sizes)))


def matrix_dimensions(parameter: Parameter) -> contrib.MuonDimensionNumbers | None:
    """Input and output dimensions of a parameter that Muon updates, None for any other."""
    dims, inputs = parameter.dims, parameter.in_dims
    if parameter.role != Role.WEIGHT or len(dims) <= inputs:
        return None
    return contrib.MuonDimensionNumbers(reduction_axis=dims[:inputs], output_axis=dims[inputs:])


def _is_matrix(leaf: object) -> bool:
    return isinstance(leaf, contrib.MuonDimensionNumbers)


@dataclasses.dataclass(frozen=True)
class OptimConfig(Checked):
    """The optimizer, its learning rates, and which parameters it trains.

    What is common to all optimizers is here, Adam's constants included: every optimizer uses Adam for some parameters.
    """

    steps: Annotated[int, Range(1, 10**9), GROWS] = 1000
    """Optimizer steps of the run. A resumed run may have more: the learning-rate schedule is then computed again for
    the new number, so the rate rises to where a run of that length would be."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.95
    """Decay of Adam's second moment."""
    epsilon: float = 1e-8
    """Added to the root of Adam's second moment."""
    weight_decay: float = 0.1
    """Weight decay of the parameters that `decay_on` selects."""
    clip_norm: float = 1.0
    """Largest global gradient norm; inf: no clipping."""
    accumulate: Annotated[int, Range(1, 2**24)] = 1
    """Micro-batches per step; divides data.rows."""
    gate_multiplier: float = 1.0
    """Learning rate of gates, relative to the others."""
    memory_multiplier: float = 1.0
    """Learning rate of the memory's other parameters, relative to the others."""
    algorithm: Annotated[AlgorithmConfig, Since(2)] = AdamW()
    """The optimizer."""
    schedule: Annotated[ScheduleConfig, Since(2)] = Cosine()
    """The learning rate after the warm-up."""
    decay_on: Annotated[tuple[str, ...], Since(2)] = ("weight", "embedding", "head")
    """Selectors of the parameters that decay: roles, groups or path patterns."""
    rates: Annotated[tuple[str, ...], Since(2)] = ()
    """Relative learning rates as SELECTOR=FACTOR, such as `memory=3` or `blocks_0/mlp=0.1`. The last one that selects a
    parameter counts, in place of `gate_multiplier` and `memory_multiplier`."""
    freeze: Annotated[tuple[str, ...], Since(2)] = ()
    """Selectors of parameters that are not trained and have no optimizer state."""
    ema_decay: Annotated[float, Since(2)] = 0.0
    """Decay of an exponential moving average of the parameters; 0: none is kept. Where it is kept, evaluation and
    `load_run` use it in place of the parameters."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"optim.steps must be at least 1, got {self.steps}")
        _require(self.learning_rate > 0, f"optim.learning_rate must be positive, got {self.learning_rate}")
        _require(
            0 <= self.warmup_steps < self.steps,
            f"optim.warmup_steps={self.warmup_steps} must be below optim.steps={self.steps}",
        )
        _require(
            0 <= self.final_fraction <= 1,
            f"optim.final_fraction must be between 0 and 1, got {self.final_fraction}",
        )
        for name in ("beta1", "beta2", "ema_decay"):
            decay = getattr(self, name)
            _require(0 <= decay < 1, f"optim.{name} must be at least 0 and below 1, got {decay}")
        _require(self.weight_decay >= 0, f"optim.weight_decay must not be negative, got {self.weight_decay}")
        _require(self.clip_norm > 0, f"optim.clip_norm must be positive, got {self.clip_norm}; inf clips nothing")
        _require(self.accumulate >= 1, f"optim.accumulate must be at least 1, got {self.accumulate}")
        self.schedule.check(self)
        _ = self.rate_rules

    @property
    def final_rate(self) -> float:
        """Learning rate at the end."""
        return self.learning_rate * self.final_fraction

    @property
    def rate_rules(self) -> tuple[tuple[str, float], ...]:
        """(selector, relative learning rate); the last that selects a parameter counts."""
        own = (("memory", self.memory_multiplier), ("gate", self.gate_multiplier))
        return own + tuple(_parse_rate(rule) for rule in self.rates)


def _parse_rate(rule: str) -> tuple[str, float]:
    """SELECTOR=FACTOR, taken apart."""
    selector, _, text = rule.rpartition("=")
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    _require(
        bool(selector) and 0 <= factor < math.inf,
        f"optim.rates: expected SELECTOR=FACTOR with a factor of at least 0, such as memory=3, got {rule!r}",
    )
    return selector, factor
