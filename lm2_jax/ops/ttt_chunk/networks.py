"""Inner networks, whose weights are trained at test time, and the losses that train them.

A network calls `linear(i, z)` once for each layer i and does not know how the layer is computed. The same function
then serves three purposes: the forward pass at fixed weights, the derivatives with respect to each layer's output, and
reads whose weights differ from token to token (`chunk`).
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lm2_jax.registry import Family
from lm2_jax.types import Array, Float

Linear = Callable[[int, Float[Array, "_ _"]], Float[Array, "_ _"]]
Weights = tuple[Float[Array, "... _ _"], ...]  # one matrix per layer; with biases, its last row is the bias

# Logical axes (inputs, outputs) of a layer. Devices may share `hidden`, the hidden width.
REPLICATED, TO_HIDDEN, FROM_HIDDEN = ("inner", "head"), ("inner", "hidden"), ("hidden", "head")


class NormWeights(NamedTuple):
    """Scale and shift of the network's layer norm: ordinary parameters, not trained at test time."""

    scale: Float[Array, "*H K"]
    shift: Float[Array, "*H K"]


def layer_norm(z: Float[Array, "C K"], norm: NormWeights, epsilon: float) -> Float[Array, "C K"]:
    """(z - mean) / sqrt(var + epsilon) * scale + shift."""
    centered = z - jnp.mean(z, axis=-1, keepdims=True)
    unit = centered * jax.lax.rsqrt(jnp.mean(centered * centered, axis=-1, keepdims=True) + epsilon)
    return unit * norm.scale[None] + norm.shift[None]


@dataclasses.dataclass(frozen=True)
class InnerNetwork(Family):
    """Base of the inner networks f(x; W)."""

    @property
    def has_bias(self) -> bool:
        """Whether the last row of each layer's matrix is a bias."""
        return False

    @property
    def has_norm(self) -> bool:
        """Whether the network uses `NormWeights`."""
        return False

    def shapes(self, width: int) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each layer, without biases."""
        raise NotImplementedError

    def axes(self) -> tuple[tuple[str, str], ...]:
        """`REPLICATED`, `TO_HIDDEN` or `FROM_HIDDEN` for each layer; a layer with a bias must be replicated."""
        return (REPLICATED,) * len(self.shapes(1))

    def __call__(self, linear: Linear, x: Float[Array, "C K"], norm: NormWeights | None) -> Float[Array, "C K"]:
        """f(x) for each row of x.

        Args:
          linear: applies layer i to rows; called once per layer.
          x: inputs.
          norm: needed if `has_norm`.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LinearNetwork(InnerNetwork):
    """f(x) = x W: an associative matrix memory."""

    kind: ClassVar[str] = "linear"

    def shapes(self, width: int) -> tuple[tuple[int, int], ...]:
        return ((width, width),)

    def __call__(self, linear: Linear, x: Float[Array, "C K"], norm: NormWeights | None) -> Float[Array, "C K"]:
        return linear(0, x)


@dataclasses.dataclass(frozen=True)
class DeepNetwork(InnerNetwork, abstract=True):
    """Base of networks f(x) = x + LN(z(x)) with hidden layers; both the sum and the norm are optional."""

    expansion: int = 4
    """Hidden width, as a multiple of the head width."""
    norm: bool = True
    """Whether the last layer's output is normalised, with a scale and a shift that are not trained at test time."""
    norm_epsilon: float = 1.0
    """Added to the variance by the norm. With 1 the norm is close to the identity for small outputs and bounds large
    ones. With 1e-6 (TTT) the output does not depend on the size of the weights, and gradients grow as forgetting
    shrinks the weights."""
    residual: bool = True
    """Whether x is added to the output."""

    def __post_init__(self) -> None:
        if self.expansion < 1:
            raise ValueError(f"memory.network.expansion must be at least 1, got {self.expansion}")
        if self.norm_epsilon <= 0:
            raise ValueError(f"memory.network.norm_epsilon must be positive, got {self.norm_epsilon}")

    @property
    def has_norm(self) -> bool:
        return self.norm

    def _output(self, z: Array, x: Array, norm: NormWeights | None) -> Array:
        """The last layer's output z after norm and residual connection."""
        z = z if norm is None else layer_norm(z, norm, self.norm_epsilon)
        return x + z if self.residual else z


@dataclasses.dataclass(frozen=True)
class MlpNetwork(DeepNetwork):
    """f(x) = x + LN(gelu(gelu(x W1) W2) ..) (Titans, arXiv:2501.00663); depth 1 is that of TTT-Linear."""

    kind: ClassVar[str] = "mlp"
    depth: int = 2
    """Number of layers; gelu is applied between layers only."""
    bias: bool = False
    """Whether layers have biases, trained at test time too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise ValueError(f"memory.network.depth must be at least 1, got {self.depth}")

    @property
    def has_bias(self) -> bool:
        return self.bias

    def shapes(self, width: int) -> tuple[tuple[int, int], ...]:
        sizes = (width, *(self.depth - 1) * (self.expansion * width,), width)
        return tuple(itertools.pairwise(sizes))

    def axes(self) -> tuple[tuple[str, str], ...]:
        """Layers in pairs, to and from the hidden width; the last layer of an odd number is replicated."""
        if self.bias:
            return super().axes()
        pairs = self.depth // 2
        return (TO_HIDDEN, FROM_HIDDEN) * pairs + (REPLICATED,) * (self.depth - 2 * pairs)

    def __call__(self, linear: Linear, x: Float[Array, "C K"], norm: NormWeights | None) -> Float[Array, "C K"]:
        z = linear(0, x)
        for layer in range(1, self.depth):
            z = linear(layer, jax.nn.gelu(z))
        return self._output(z, x, norm)


@dataclasses.dataclass(frozen=True)
class SwigluNetwork(DeepNetwork):
    """f(x) = x + LN((silu(x W1) * (x W2)) W3); `model.memory.network` of kind `swiglu`."""

    kind: ClassVar[str] = "swiglu"
    expansion: int = 2
    """Hidden width, as a multiple of the head width."""

    def shapes(self, width: int) -> tuple[tuple[int, int], ...]:
        hidden = self.expansion * width
        return (width, hidden), (width, hidden), (hidden, width)

    def axes(self) -> tuple[tuple[str, str], ...]:
        return TO_HIDDEN, TO_HIDDEN, FROM_HIDDEN

    def __call__(self, linear: Linear, x: Float[Array, "C K"], norm: NormWeights | None) -> Float[Array, "C K"]:
        return self._output(linear(2, jax.nn.silu(linear(0, x)) * linear(1, x)), x, norm)


@dataclasses.dataclass(frozen=True)
class InnerLoss(Family):
    """Base of the inner losses l(f(k), v) of one token: sums over the head width."""

    def __call__(self, y: Float[Array, "C K"], target: Float[Array, "C K"]) -> Float[Array, " C"]:
        """The loss of each row."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SquaredError(InnerLoss):
    """factor * |f(k) - v|^2, a sum over the head width K; factor 1/K gives the mean."""

    kind: ClassVar[str] = "squared"
    factor: float = 1.0
    """1 is Titans' equation 12, whose gradient has a factor of 2; 0.5 is TTT's loss."""

    def __call__(self, y: Float[Array, "C K"], target: Float[Array, "C K"]) -> Float[Array, " C"]:
        error = y - target
        return self.factor * jnp.sum(error * error, axis=-1)


@dataclasses.dataclass(frozen=True)
class HuberLoss(InnerLoss):
    """e^2 / 2 for |e| <= delta, else delta (|e| - delta / 2); e = f(k) - v. `model.memory.loss` of kind `huber`."""

    kind: ClassVar[str] = "huber"
    delta: float = 1.0
    """Largest gradient that one component of the error can have."""

    def __post_init__(self) -> None:
        if self.delta <= 0:
            raise ValueError(f"memory.loss.delta must be positive, got {self.delta}")

    def __call__(self, y: Float[Array, "C K"], target: Float[Array, "C K"]) -> Float[Array, " C"]:
        size = jnp.abs(y - target)
        clipped = jnp.minimum(size, self.delta)
        return jnp.sum(clipped * (size - clipped / 2), axis=-1)


@dataclasses.dataclass(frozen=True)
class PowerLoss(InnerLoss):
    """(e^2 + smoothing)^(p/2); e = f(k) - v (arXiv:2504.13173). `model.memory.loss` of kind `power`."""

    kind: ClassVar[str] = "power"
    p: float = 3.0
    """The exponent, at least 1."""
    smoothing: float = 1e-6
    """Makes the loss differentiable at e = 0 for p < 2."""

    def __post_init__(self) -> None:
        if self.p < 1:
            raise ValueError(f"memory.loss.p must be at least 1, got {self.p}")
        if self.smoothing <= 0:
            raise ValueError(f"memory.loss.smoothing must be positive, got {self.smoothing}")

    def __call__(self, y: Float[Array, "C K"], target: Float[Array, "C K"]) -> Float[Array, " C"]:
        error = y - target
        return jnp.sum((error * error + self.smoothing) ** (self.p / 2), axis=-1)
