"""Networks that a neural memory trains at test time, and the losses they are trained on.

A network is a pure function of its layers: it is given `linear(i, z)`, which applies layer i to rows z, and does not
know what the layer does. So one function serves the forward pass at given weights, the derivative by each layer's
output, and the read with weights that differ from token to token (`chunk_form`). It must call each layer once.
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
Weights = tuple[Float[Array, "... _ _"], ...]  # one matrix per layer; its last row is the bias, where there is one

# Logical axes of a layer's inputs and outputs: to a hidden width that devices share, and back with one sum over them.
WHOLE, TO_HIDDEN, FROM_HIDDEN = ("inner", "head"), ("inner", "hidden"), ("hidden", "head")


class NormWeights(NamedTuple):
    """Scale and shift of the network's normalised output: slow parameters, trained outside."""

    scale: Float[Array, "*H K"]
    shift: Float[Array, "*H K"]


def layer_norm(z: Float[Array, "C K"], norm: NormWeights, epsilon: float) -> Float[Array, "C K"]:
    """(z - mean) / sqrt(var + epsilon) * scale + shift."""
    centered = z - jnp.mean(z, axis=-1, keepdims=True)
    unit = centered * jax.lax.rsqrt(jnp.mean(centered * centered, axis=-1, keepdims=True) + epsilon)
    return unit * norm.scale[None] + norm.shift[None]


@dataclasses.dataclass(frozen=True)
class InnerNetwork(Family):
    """Base of the networks f(x; W) that hold the memory."""

    @property
    def has_bias(self) -> bool:
        """Whether each layer's matrix has a last row that is added."""
        return False

    @property
    def has_norm(self) -> bool:
        """Whether the network uses `NormWeights`."""
        return False

    def shapes(self, width: int) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of each layer, without biases."""
        raise NotImplementedError

    def axes(self) -> tuple[tuple[str, str], ...]:
        """`WHOLE`, `TO_HIDDEN` or `FROM_HIDDEN` of each layer; where the last row is a bias, inputs are whole."""
        return (WHOLE,) * len(self.shapes(1))

    def __call__(self, linear: Linear, x: Float[Array, "C K"], norm: NormWeights | None) -> Float[Array, "C K"]:
        """f(x), row by row.

        Args:
          linear: applies a layer by its number.
          x: rows.
          norm: where `has_norm`.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LinearNetwork(InnerNetwork):
    """f(x) = x W: a matrix of associations."""

    kind: ClassVar[str] = "linear"

    def shapes(self, width: int) -> tuple[tuple[int, int], ...]:
        """One square layer."""
        return ((width, width),)

    def __call__(self, linear: Linear, x: Float[Array, "C K"], norm: NormWeights | None) -> Float[Array, "C K"]:
        """See the base class."""
        return linear(0, x)


@dataclasses.dataclass(frozen=True)
class MlpNetwork(InnerNetwork):
    """f(x) = x + LN(gelu(gelu(x W1) W2) ..), of any depth (Titans, arXiv:2501.00663; depth 1: TTT-Linear)."""

    kind: ClassVar[str] = "mlp"
    depth: int = 2
    """Layers; with one there is no nonlinearity but the norm."""
    expansion: int = 4
    """Hidden width, in widths of a head."""
    bias: bool = False
    """Whether layers have biases, which are trained at test time too."""
    norm: bool = True
    """Whether the output of the last layer is normalised, with a slow scale and shift."""
    norm_epsilon: float = 1.0
    """Added to the variance by the norm. With 1 it is nearly the identity for small outputs and bounds large ones; with
    TTT's 1e-6 the output does not depend on the weights' size, and gradients grow as forgetting shrinks them."""
    residual: bool = True
    """Whether x is added."""

    def __post_init__(self) -> None:
        for name in ("depth", "expansion"):
            if getattr(self, name) < 1:
                raise ValueError(f"memory.network.{name} must be at least 1, got {getattr(self, name)}")
        _check_epsilon(self.norm_epsilon)

    @property
    def has_bias(self) -> bool:
        """As configured."""
        return self.bias

    @property
    def has_norm(self) -> bool:
        """As configured."""
        return self.norm

    def shapes(self, width: int) -> tuple[tuple[int, int], ...]:
        """Width, hidden widths, width."""
        sizes = (width, *(self.depth - 1) * (self.expansion * width,), width)
        return tuple(itertools.pairwise(sizes))

    def axes(self) -> tuple[tuple[str, str], ...]:
        """To the hidden width and from it by turns; a last layer without a pair is whole."""
        if self.bias:
            return super().axes()
        pairs = self.depth // 2
        return (TO_HIDDEN, FROM_HIDDEN) * pairs + (WHOLE,) * (self.depth - 2 * pairs)

    def __call__(self, linear: Linear, x: Float[Array, "C K"], norm: NormWeights | None) -> Float[Array, "C K"]:
        """See the base class."""
        z = linear(0, x)
        for layer in range(1, self.depth):
            z = linear(layer, jax.nn.gelu(z))
        return _finish(z, x, norm, self.norm_epsilon, self.residual)


@dataclasses.dataclass(frozen=True)
class SwigluNetwork(InnerNetwork):
    """f(x) = x + LN((silu(x W1) * (x W2)) W3)."""

    kind: ClassVar[str] = "swiglu"
    expansion: int = 2
    """Hidden width, in widths of a head."""
    norm: bool = True
    """Whether the output of the last layer is normalised, with a slow scale and shift."""
    norm_epsilon: float = 1.0
    """Added to the variance by the norm. With 1 it is nearly the identity for small outputs and bounds large ones; with
    TTT's 1e-6 the output does not depend on the weights' size, and gradients grow as forgetting shrinks them."""
    residual: bool = True
    """Whether x is added."""

    def __post_init__(self) -> None:
        if self.expansion < 1:
            raise ValueError(f"memory.network.expansion must be at least 1, got {self.expansion}")
        _check_epsilon(self.norm_epsilon)

    @property
    def has_norm(self) -> bool:
        """As configured."""
        return self.norm

    def shapes(self, width: int) -> tuple[tuple[int, int], ...]:
        """Gate, up and down."""
        hidden = self.expansion * width
        return (width, hidden), (width, hidden), (hidden, width)

    def axes(self) -> tuple[tuple[str, str], ...]:
        """See the base class."""
        return TO_HIDDEN, TO_HIDDEN, FROM_HIDDEN

    def __call__(self, linear: Linear, x: Float[Array, "C K"], norm: NormWeights | None) -> Float[Array, "C K"]:
        """See the base class."""
        return _finish(linear(2, jax.nn.silu(linear(0, x)) * linear(1, x)), x, norm, self.norm_epsilon, self.residual)


def _check_epsilon(epsilon: float) -> None:
    if epsilon <= 0:
        raise ValueError(f"memory.network.norm_epsilon must be positive, got {epsilon}")


def _finish(z: Array, x: Array, norm: NormWeights | None, epsilon: float, residual: bool) -> Array:
    """The last layer's output, normalised and added to x as configured."""
    z = z if norm is None else layer_norm(z, norm, epsilon)
    return x + z if residual else z


@dataclasses.dataclass(frozen=True)
class InnerLoss(Family):
    """Base of the losses l(f(k), v) of one token, a sum over the head's width."""

    def __call__(self, found: Float[Array, "C K"], wanted: Float[Array, "C K"]) -> Float[Array, " C"]:
        """The loss of each row."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SquaredError(InnerLoss):
    """factor * |f(k) - v|^2: a sum, as in the paper; a mean over the width K, as some have it, is factor 1/K."""

    kind: ClassVar[str] = "squared"
    factor: float = 1.0
    """1: Titans' equation 12, whose gradient has a factor 2; 0.5: TTT's."""

    def __call__(self, found: Float[Array, "C K"], wanted: Float[Array, "C K"]) -> Float[Array, " C"]:
        """See the base class."""
        error = found - wanted
        return self.factor * jnp.sum(error * error, axis=-1)


@dataclasses.dataclass(frozen=True)
class HuberLoss(InnerLoss):
    """e^2 / 2 where |e| <= delta, else delta (|e| - delta / 2): outliers pull with a bounded force."""

    kind: ClassVar[str] = "huber"
    delta: float = 1.0
    """Where the parabola becomes a line."""

    def __post_init__(self) -> None:
        if self.delta <= 0:
            raise ValueError(f"memory.loss.delta must be positive, got {self.delta}")

    def __call__(self, found: Float[Array, "C K"], wanted: Float[Array, "C K"]) -> Float[Array, " C"]:
        """See the base class."""
        size = jnp.abs(found - wanted)
        near = jnp.minimum(size, self.delta)
        return jnp.sum(near * (size - near / 2), axis=-1)


@dataclasses.dataclass(frozen=True)
class PowerLoss(InnerLoss):
    """|e|^p (arXiv:2504.13173), with |e| = sqrt(e^2 + smoothing), so that it has a derivative at 0 for p < 2."""

    kind: ClassVar[str] = "power"
    p: float = 3.0
    """The exponent, at least 1."""
    smoothing: float = 1e-6
    """Added under the root."""

    def __post_init__(self) -> None:
        if self.p < 1:
            raise ValueError(f"memory.loss.p must be at least 1, got {self.p}")
        if self.smoothing <= 0:
            raise ValueError(f"memory.loss.smoothing must be positive, got {self.smoothing}")

    def __call__(self, found: Float[Array, "C K"], wanted: Float[Array, "C K"]) -> Float[Array, " C"]:
        """See the base class."""
        error = found - wanted
        return jnp.sum((error * error + self.smoothing) ** (self.p / 2), axis=-1)
