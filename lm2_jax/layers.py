"""Layers shared by decoder and memories: every kernel names its logical axes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm2_jax.decoder import RopeScaling
from lm2_jax.partition import constrain as constrain
from lm2_jax.partition import is_split, pin
from lm2_jax.precision import Precision, safe
from lm2_jax.types import Array, Axes, Float, Int

GATHERED = frozenset({"embed", "row_width"})  # dimensions of a kernel that are gathered where it is used
TABLE = ("vocab", "row_width")  # of the embedding
WHOLE = GATHERED | {"gate_width"}  # dimensions that activations never split


def named(init: Any, axes: tuple[str, ...]) -> Any:
    """`init`, whose parameter carries a logical name for each axis and is a plain array wherever it is used."""
    return nn.with_logical_partitioning(init, axes)


class Einsum(nn.Module):
    """A kernel with one axis name per dimension; the equation stands at the call.

    `Einsum((D, H, K), ("embed", "heads", "head"), precision)("btd,dhk->bthk", x)`

    Attributes:
      shape: of the kernel.
      axes: logical axis of each dimension.
      precision: number types.
      in_dims: leading kernel dimensions that are summed over; their product is the fan-in.
      scale: initial standard deviation times the root of the fan-in.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    precision: Precision
    in_dims: int = 1
    scale: float = 1.0

    @nn.compact
    def __call__(self, equation: str, x: Array) -> Array:
        """`einsum(equation, x, kernel)` in the compute type."""
        std = self.scale / math.sqrt(math.prod(self.shape[: self.in_dims]))
        init = named(nn.initializers.normal(std), self.axes)
        w = self.param("w", init, self.shape, jnp.dtype(self.precision.params))
        dtype = jnp.dtype(self.precision.compute)
        kernel_axes, axes = _without(GATHERED, self.axes), _without(WHOLE, self.axes)
        w, x = gathered(w.astype(dtype), self.axes, kernel_axes), pin(x.astype(dtype), axes[: self.in_dims])
        if kernel_axes != axes:  # each device takes its part of what is summed; without this, all would sum the whole
            x = pin(x, kernel_axes[: self.in_dims])
        return pin(_flat_einsum(equation, x, w, self.in_dims), axes[self.in_dims :])


def gathered(w: Array, axes: Axes, kernel_axes: Axes) -> Array:
    """The kernel as it is used; its gradient is summed right into the parts that devices keep.

    A constraint alone would hold for the gradient too: an all-reduce, of which each device then takes its part.
    """
    if not is_split():
        return constrain(w, kernel_axes)
    used = jax.custom_vjp(lambda w: constrain(w, kernel_axes))
    used.defvjp(lambda w: (constrain(w, kernel_axes), None), lambda _, gradient: (constrain(gradient, axes),))
    return used(w)


def _without(names: frozenset[str], axes: Axes) -> Axes:
    return tuple(None if name in names else name for name in axes)


def _flat_einsum(equation: str, x: Array, w: Array, in_dims: int) -> Array:
    """`einsum(equation, x, w)` with the leading dimensions of `x` as one, where it lies on one device.

    The kernel's gradient then sums over one dimension; over three, XLA's CPU backend took 1.8 times as long for the
    forward and backward pass of an MLP (64 x 4 x 32 tokens, width 64). Rows and tokens that are both split cannot
    become one dimension without being gathered.
    """
    inputs, output = equation.split("->")
    x_names, w_names = inputs.split(",")
    lead, summed = x_names[:-in_dims], x_names[-in_dims:]
    if w_names[:in_dims] != summed or output != lead + w_names[in_dims:]:
        raise ValueError(f"expected an equation like {lead}{summed},{summed}..->{lead}.., got {equation}")
    if is_split():
        return jnp.einsum(equation, x, w)
    flat = x.reshape(-1, *x.shape[-in_dims:])
    y = jnp.einsum(f"z{summed},{w_names}->z{output[len(lead) :]}", flat, w)
    return y.reshape(*x.shape[:-in_dims], *y.shape[1:])


class Vector(nn.Module):
    """A bias or a learned start: one array with named axes, initially `fill`."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    precision: Precision
    fill: float = 0.0

    @nn.compact
    def __call__(self) -> Array:
        """The array, in the parameters' type."""
        init = named(nn.initializers.constant(self.fill), self.axes)
        return self.param("b", init, self.shape, jnp.dtype(self.precision.params))


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * scale, in float32 at least."""

    precision: Precision
    epsilon: float = 1e-5
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises the last dimension; the result has the compute type."""
        init = named(nn.initializers.ones, (self.axis,))
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(self.precision.params))
        wide = x.astype(safe(x.dtype))
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        scale = jnp.expand_dims(scale.astype(wide.dtype), range(x.ndim - 1))
        return (wide * scale).astype(jnp.dtype(self.precision.compute))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    width: int
    hidden: int
    precision: Precision

    def setup(self) -> None:
        shape, axes = (self.width, self.hidden), ("embed", "mlp")
        self.gated = Einsum(shape, axes, self.precision)
        self.up = Einsum(shape, axes, self.precision)
        self.down = Einsum((self.hidden, self.width), ("mlp", "embed"), self.precision)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Applies the layer to the last dimension."""
        hidden = nn.silu(self.gated("...d,df->...f", x)) * self.up("...d,df->...f", x)
        return self.down("...f,fd->...d", hidden)


class Embed(nn.Module):
    """Token embedding whose transpose can serve as the head."""

    vocab_size: int
    width: int
    precision: Precision

    def setup(self) -> None:
        init = named(nn.initializers.normal(self.width**-0.5), TABLE)
        self.table_VD = self.param("table", init, (self.vocab_size, self.width), jnp.dtype(self.precision.params))

    def __call__(self, tokens: Int[Array, "*lead"]) -> Float[Array, "*lead D"]:
        """Rows of the table in the compute type.

        Each device looks up, for all rows of its copy of the model, the part of the width that it keeps, and the parts
        are exchanged: the gradient is then summed part by part, not as a whole table on every device.
        """
        table_VD = self.table_VD.astype(jnp.dtype(self.precision.compute))
        rest = (None,) * (tokens.ndim - 1)
        x = jnp.take(table_VD, constrain(tokens, ("copies", *rest)), axis=0)
        return constrain(x, ("copies", *rest, "row_width"))

    def attend(self, hidden_BSD: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Logits under the tied head, in the logits' type."""
        logits = jnp.dtype(self.precision.logits)
        table_VD = gathered(self.table_VD.astype(hidden_BSD.dtype), TABLE, _without(GATHERED, TABLE))
        return jnp.einsum("bsd,vd->bsv", hidden_BSD, table_VD, preferred_element_type=logits)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of each of the K/2 rotated pairs, float64.

    f_i = theta^(-2i/K);  Llama 3 divides f by `factor` below a first frequency, keeps it above a second one and
    blends linearly in original_tokens * f / (2 pi) between them.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequency
    turns = scaling.original_tokens * frequency / (2 * np.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def rotate(x: Array, positions: Int[Array, "..."], frequencies: np.ndarray) -> Array:
    """Rotary embedding of `x`, its halves paired as in Llama (i with i + K/2).

    Args:
      x: [... T heads K].
      positions: [T], or [... T] with leading dimensions as in `x`; may be negative.
      frequencies: K/2 radians per position.
    Returns:
      As `x`; angles are float32 at least, exact because positions count from the segment.
    """
    dtype = safe(x.dtype)
    angle = positions[..., None].astype(dtype) * jnp.expand_dims(jnp.asarray(frequencies, dtype), range(positions.ndim))
    angle = jnp.expand_dims(angle, (*range(x.ndim - 1 - angle.ndim), -2))
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
