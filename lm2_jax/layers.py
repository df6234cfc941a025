"""Layers that decoder and memories share. Every parameter declares its logical axes and its role."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm2_jax.decoder import Adapter, DecoderConfig, LoraConfig
from lm2_jax.parameters import LORA, Role
from lm2_jax.parameters import named as named
from lm2_jax.partition import constrain as constrain
from lm2_jax.partition import constrain_last, is_split
from lm2_jax.precision import Precision, at_least_float32
from lm2_jax.types import Array, Axes, Float, Int

GATHERED = frozenset({"embed", "row_width"})  # kernel dimensions that are gathered before use
TABLE_AXES = ("vocab", "row_width")  # of the embedding
NEVER_SPLIT = GATHERED | {"gate_width"}  # dimensions that activations never split


class Einsum(nn.Module):
    """A kernel with one logical axis per dimension; the equation is given in the call.

    `Einsum((D, H, K), ("embed", "heads", "head"), precision)("btd,dhk->bthk", x)`

    Attributes:
      shape: of the kernel.
      axes: logical axis of each dimension.
      precision: number types.
      in_dims: leading kernel dimensions that are summed over; their product is the fan-in.
      scale: initial standard deviation times the root of the fan-in.
      role: what the kernel does; `Role.GATE` if its product is a gate.
      group: see `named`.
      adapter: a low-rank addition to the kernel, if any.
      bias: whether a vector is added to the output, at first zero.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    precision: Precision
    in_dims: int = 1
    scale: float = 1.0
    role: Role = Role.WEIGHT
    group: str | None = None
    adapter: Adapter | None = None
    bias: bool = False

    @nn.compact
    def __call__(self, equation: str, x: Array) -> Array:
        """`einsum(equation, x, kernel)` in the compute type."""
        std = self.scale / math.sqrt(math.prod(self.shape[: self.in_dims]))
        init = named(nn.initializers.normal(std), self.axes, self.role, self.in_dims, self.group)
        w = self.param("w", init, self.shape, jnp.dtype(self.precision.params))
        dtype = jnp.dtype(self.precision.compute)
        kernel_axes, axes = _without(GATHERED, self.axes), _without(NEVER_SPLIT, self.axes)
        w, x = (
            fsdp_gather(w.astype(dtype), self.axes, kernel_axes),
            constrain_last(x.astype(dtype), axes[: self.in_dims]),
        )
        if kernel_axes != axes:  # each device sums over its shard of the input; without this, each would do it all
            x = constrain_last(x, kernel_axes[: self.in_dims])
        y = _flat_einsum(equation, x, w, self.in_dims)
        if self.adapter is not None:
            y = y + self._low_rank(equation, x, self.adapter)
        if self.bias:
            y = y + jnp.expand_dims(self._bias(dtype), range(y.ndim - len(self.axes) + self.in_dims))
        return constrain_last(y, axes[self.in_dims :])

    def _bias(self, dtype: jnp.dtype) -> Array:
        out = self.axes[self.in_dims :]
        init = named(nn.initializers.zeros, out, Role.BIAS, group=self.group)
        b = self.param("b", init, self.shape[self.in_dims :], jnp.dtype(self.precision.params))
        return fsdp_gather(b.astype(dtype), out, _without(GATHERED, out))

    def _low_rank(self, equation: str, x: Array, adapter: Adapter) -> Array:
        """The output of the adapter, scale * x A B; A is drawn as a kernel is, B starts at zero."""
        n, std = self.in_dims, 1 / math.sqrt(math.prod(self.shape[: self.in_dims]))
        a_axes, b_axes = (*self.axes[:n], "rank"), ("rank", *self.axes[n:])
        a_init = named(nn.initializers.normal(std), a_axes, Role.WEIGHT, n, LORA)
        b_init = named(nn.initializers.zeros, b_axes, Role.WEIGHT, 1, LORA)
        dtype = jnp.dtype(self.precision.params)
        a = self.param("lora_a", a_init, (*self.shape[:n], adapter.rank), dtype)
        b = self.param("lora_b", b_init, (adapter.rank, *self.shape[n:]), dtype)
        a, b = (
            fsdp_gather(part.astype(x.dtype), part_axes, _without(GATHERED, part_axes))
            for part, part_axes in ((a, a_axes), (b, b_axes))
        )
        inputs, output = equation.split("->")
        x_names, w_names = inputs.split(",")
        low = f"{x_names[:-n]}R"  # no equation of a kernel uses this letter
        inner = _flat_einsum(f"{x_names},{w_names[:n]}R->{low}", x, a, n)
        return _flat_einsum(f"{low},R{w_names[n:]}->{output}", inner, b, 1) * adapter.scale


def fsdp_gather(w: Array, axes: Axes, kernel_axes: Axes) -> Array:
    """All-gathers a sharded kernel for use; its gradient is reduce-scattered.

    A sharding constraint alone would apply to the gradient too: an all-reduce, followed by a slice on each device.

    Args:
      w: kernel.
      axes: logical axes of the stored kernel.
      kernel_axes: logical axes of the kernel in use, None for a gathered dimension.
    """
    if not is_split():
        return constrain(w, kernel_axes)
    used = jax.custom_vjp(lambda w: constrain(w, kernel_axes))
    used.defvjp(lambda w: (constrain(w, kernel_axes), None), lambda _, gradient: (constrain(gradient, axes),))
    return used(w)


def _without(names: frozenset[str], axes: Axes) -> Axes:
    return tuple(None if name in names else name for name in axes)


def _flat_einsum(equation: str, x: Array, w: Array, in_dims: int) -> Array:
    """`einsum(equation, x, w)`; on a single device, the leading dimensions of `x` are merged into one.

    The kernel's gradient then sums over one dimension. Summing over three took XLA's CPU backend 1.8 times as long for
    the forward and backward pass of an MLP (64 x 4 x 32 tokens, width 64). On several devices, merging two sharded
    dimensions would gather them.
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
    """One array with named axes, initially `fill`: a bias, unless `role` says otherwise."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    precision: Precision
    fill: float = 0.0
    role: Role = Role.BIAS
    group: str | None = None

    @nn.compact
    def __call__(self) -> Array:
        """The array, in the parameters' type."""
        init = named(nn.initializers.constant(self.fill), self.axes, self.role, group=self.group)
        return self.param("b", init, self.shape, jnp.dtype(self.precision.params))


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * scale, computed in float32 or wider."""

    precision: Precision
    epsilon: float = 1e-5
    axis: str = "norm"
    group: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises the last dimension; the result has the compute type."""
        init = named(nn.initializers.ones, (self.axis,), Role.NORM, group=self.group)
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(self.precision.params))
        x = x.astype(at_least_float32(x.dtype))
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        scale = jnp.expand_dims(scale.astype(x.dtype), range(x.ndim - 1))
        return (x * scale).astype(jnp.dtype(self.precision.compute))


class LayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + b, computed in float32 or wider."""

    precision: Precision
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises the last dimension; the result has the compute type."""
        dtype = jnp.dtype(self.precision.params)
        ones, zeros = (named(fill, ("norm",), Role.NORM) for fill in (nn.initializers.ones, nn.initializers.zeros))
        scale, b = self.param("scale", ones, (x.shape[-1],), dtype), self.param("b", zeros, (x.shape[-1],), dtype)
        x = x.astype(at_least_float32(x.dtype))
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        scale, b = (jnp.expand_dims(a.astype(x.dtype), range(x.ndim - 1)) for a in (scale, b))
        return (x * scale + b).astype(jnp.dtype(self.precision.compute))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    width: int
    hidden: int
    precision: Precision
    lora: LoraConfig = LoraConfig()

    def setup(self) -> None:
        shape, axes = (self.width, self.hidden), ("embed", "mlp")
        self.gated = Einsum(shape, axes, self.precision, adapter=self.lora.adapter("mlp/gated"))
        self.up = Einsum(shape, axes, self.precision, adapter=self.lora.adapter("mlp/up"))
        back = (shape[::-1], axes[::-1], self.precision)
        self.down = Einsum(*back, adapter=self.lora.adapter("mlp/down"))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Applies the layer to the last dimension."""
        hidden = nn.silu(self.gated("...d,df->...f", x)) * self.up("...d,df->...f", x)
        return self.down("...f,fd->...d", hidden)


class GeluMLP(nn.Module):
    """down(gelu(up(x))), with biases and GELU's tanh form, as in GPT-2."""

    width: int
    hidden: int
    precision: Precision
    lora: LoraConfig = LoraConfig()

    def setup(self) -> None:
        shape, axes, adapter = (self.width, self.hidden), ("embed", "mlp"), self.lora.adapter
        self.up = Einsum(shape, axes, self.precision, adapter=adapter("mlp/up"), bias=True)
        self.down = Einsum(shape[::-1], axes[::-1], self.precision, adapter=adapter("mlp/down"), bias=True)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Applies the layer to the last dimension."""
        return self.down("...f,fd->...d", nn.gelu(self.up("...d,df->...f", x), approximate=True))


MLPS: dict[str, type[SwiGLU] | type[GeluMLP]] = {"swiglu": SwiGLU, "gelu": GeluMLP}
NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}


def decoder_norm(decoder: DecoderConfig, precision: Precision) -> RMSNorm | LayerNorm:
    """A norm of the decoder."""
    return NORMS[decoder.norm](precision, decoder.norm_epsilon)


def decoder_mlp(decoder: DecoderConfig, precision: Precision) -> SwiGLU | GeluMLP:
    """The MLP of a decoder block."""
    return MLPS[decoder.mlp](decoder.width, decoder.mlp_width, precision, decoder.lora)


class Positions(nn.Module):
    """A learned vector for each position.

    Attributes:
      rows: number of positions.
      width: of a vector.
      precision: number types.
      end: a position from here on has a vector of zeros; None: none has.
    """

    rows: int
    width: int
    precision: Precision
    end: int | None = None

    @nn.compact
    def __call__(self, position: Int[Array, "*lead"]) -> Float[Array, "*lead D"]:
        """Vectors in the compute type; after the last row, those of the last row."""
        init, axes = nn.initializers.normal(self.width**-0.5), ("window", "row_width")
        table_ND = self.param(
            "table", named(init, axes, Role.EMBEDDING), (self.rows, self.width), jnp.dtype(self.precision.params)
        )
        table_ND = fsdp_gather(table_ND.astype(jnp.dtype(self.precision.compute)), axes, _without(GATHERED, axes))
        placed = jnp.take(table_ND, position, axis=0, mode="clip")
        return placed if self.end is None else jnp.where((position < self.end)[..., None], placed, 0)


class Embed(nn.Module):
    """Token embedding; its transpose can be the output head (tied head)."""

    vocab_size: int
    width: int
    precision: Precision

    def setup(self) -> None:
        init = named(nn.initializers.normal(self.width**-0.5), TABLE_AXES, Role.EMBEDDING)
        self.table_VD = self.param("table", init, (self.vocab_size, self.width), jnp.dtype(self.precision.params))

    def __call__(self, tokens: Int[Array, "*lead"]) -> Float[Array, "*lead D"]:
        """Embeddings in the compute type.

        Each device looks up its shard of the width for all rows of its model replica, then the shards are exchanged.
        So the gradient is reduced shard by shard, and no device holds the gradient of the full table.
        """
        table_VD = self.table_VD.astype(jnp.dtype(self.precision.compute))
        rest = (None,) * (tokens.ndim - 1)
        x = jnp.take(table_VD, constrain(tokens, ("copies", *rest)), axis=0)
        return constrain(x, ("copies", *rest, "row_width"))

    def attend(self, hidden_BSD: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Logits of the tied head, in the type `precision.logits`."""
        logits = jnp.dtype(self.precision.logits)
        table_VD = fsdp_gather(self.table_VD.astype(hidden_BSD.dtype), TABLE_AXES, _without(GATHERED, TABLE_AXES))
        return jnp.einsum("bsd,vd->bsv", hidden_BSD, table_VD, preferred_element_type=logits)


def rotate(x: Array, positions: Int[Array, "..."], frequencies: np.ndarray | None) -> Array:
    """Rotary position embedding of `x`; dimension i is paired with i + K/2, as in Llama.

    Args:
      x: [... T heads K].
      positions: [T], or [... T] with the leading dimensions of `x`; may be negative.
      frequencies: radians per position of the K/2 pairs; None: nothing is rotated.
    Returns:
      The shape and type of `x`. Angles are computed in float32 or wider; positions count from the start of the
      segment, so they stay small enough to be exact.
    """
    if frequencies is None:
        return x
    dtype = at_least_float32(x.dtype)
    angle = positions[..., None].astype(dtype) * jnp.expand_dims(jnp.asarray(frequencies, dtype), range(positions.ndim))
    angle = jnp.expand_dims(angle, (*range(x.ndim - 1 - angle.ndim), -2))
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
