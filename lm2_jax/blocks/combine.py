"""How the outputs of attention and of a memory become one: the product and the mix that Titans leaves open."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.layers import Einsum, RMSNorm, Vector
from lm2_jax.memory.base import Metrics, record
from lm2_jax.parameters import MEMORY, Role
from lm2_jax.precision import Precision, at_least_float32
from lm2_jax.registry import Family
from lm2_jax.types import Array, Float


@dataclasses.dataclass(frozen=True)
class CombineConfig(Family):
    """Base of all combinations; `model.join.combine` of a run."""

    def build(self, width: int, precision: Precision) -> nn.Module:
        """The module `(y, m, metrics) -> output`, all [... D]."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Product(CombineConfig):
    """o = norm(y) * sigmoid(norm(m)): the memory decides how much of each channel of attention passes."""

    kind: ClassVar[str] = "product"

    def build(self, width: int, precision: Precision) -> "ProductModule":
        """The module."""
        return ProductModule(precision)


@dataclasses.dataclass(frozen=True)
class Mix(CombineConfig):
    """o = g * y + (1 - g) * m with g = sigmoid(norm(y) W + norm(m) U + b): each channel from one or the other."""

    kind: ClassVar[str] = "mix"
    bias: float = 0.0
    """Initial b; positive values favour attention."""

    def build(self, width: int, precision: Precision) -> "MixModule":
        """The module."""
        return MixModule(width, self.bias, precision)


@dataclasses.dataclass(frozen=True)
class Add(CombineConfig):
    """o = y + s * m with a scale s per channel that starts at 0 (as in ReZero): at first, attention's output alone.

    Titans does not have this form. It serves a memory that is added to a trained decoder.
    """

    kind: ClassVar[str] = "add"

    def build(self, width: int, precision: Precision) -> "AddModule":
        """The module."""
        return AddModule(width, precision)


class ProductModule(nn.Module):
    """See `Product`."""

    precision: Precision

    def setup(self) -> None:
        self.norm_attention, self.norm_memory = RMSNorm(self.precision), RMSNorm(self.precision, group=MEMORY)

    def __call__(self, y: Float[Array, "*lead D"], m: Float[Array, "*lead D"], metrics: Metrics) -> Array:
        """Both sides normalised with learned scales, as Titans (arXiv:2501.00663, section 4.2) says of its gating.

        Args:
          y: output of attention.
          m: output of the memory.
          metrics: receives the mean of the gate.
        """
        gate = self.norm_memory(m)
        gate = jax.nn.sigmoid(gate.astype(at_least_float32(gate.dtype)))
        record(metrics, gate_memory=gate)
        normed = self.norm_attention(y)
        return (normed.astype(gate.dtype) * gate).astype(normed.dtype)


class MixModule(nn.Module):
    """See `Mix`."""

    width: int
    bias: float
    precision: Precision

    def setup(self) -> None:
        shape, axes = (self.width, self.width), ("gate_width", "embed")
        self.norm_attention, self.norm_memory = RMSNorm(self.precision), RMSNorm(self.precision, group=MEMORY)
        self.gate_attention, self.gate_memory = (
            Einsum(shape, axes, self.precision, scale=0.5, role=Role.GATE) for _ in range(2)
        )
        self.gate_bias = Vector((self.width,), ("state_embed",), self.precision, fill=self.bias, role=Role.GATE)

    def __call__(self, y: Float[Array, "*lead D"], m: Float[Array, "*lead D"], metrics: Metrics) -> Array:
        """A convex combination, so that either side can be silent; arguments as of `ProductModule`."""
        project = "...d,de->...e"
        logit = self.gate_attention(project, self.norm_attention(y)) + self.gate_memory(project, self.norm_memory(m))
        logit = logit.astype(at_least_float32(logit.dtype))
        bias = self.gate_bias().astype(logit.dtype).reshape((1,) * (logit.ndim - 1) + (-1,))
        gate = jax.nn.sigmoid(logit + bias)
        record(metrics, gate_memory=1 - gate)
        return (gate * y.astype(gate.dtype) + (1 - gate) * m.astype(gate.dtype)).astype(y.dtype)


class AddModule(nn.Module):
    """See `Add`."""

    width: int
    precision: Precision

    def setup(self) -> None:
        self.loudness = Vector((self.width,), ("state_embed",), self.precision, role=Role.GATE)

    def __call__(self, y: Float[Array, "*lead D"], m: Float[Array, "*lead D"], metrics: Metrics) -> Array:
        """See `Add`; arguments as of `ProductModule`."""
        scale = jnp.expand_dims(self.loudness(), range(m.ndim - 1))
        return y + (m * scale.astype(m.dtype)).astype(y.dtype)
