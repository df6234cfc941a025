"""From tokens to the inputs of an inner memory: projections with short convolutions, gates, parameters of its norm."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.layers import Einsum, Vector, constrain, named
from lm2_jax.ops.ttt_chunk.networks import NormWeights
from lm2_jax.parameters import Role
from lm2_jax.precision import Precision, at_least_float32
from lm2_jax.types import Array, Bool, Float, Int


class CausalConv(nn.Module):
    """Depthwise causal convolution: y_t = sum_j kernel_j * x_{t-j} for 0 <= j < kernel_size."""

    kernel_size: int
    num_heads: int
    head_width: int
    precision: Precision

    @nn.compact
    def __call__(
        self, x_BTHK: Float[Array, "B T H K"], tail_BWHK: Float[Array, "B W H K"] | None, valid_BT: Bool[Array, "B T"]
    ) -> Float[Array, "B T H K"]:
        """Convolves consecutive tokens.

        Args:
          x_BTHK: inputs.
          tail_BWHK: the kernel_size - 1 inputs before them; None if kernel_size is 1.
          valid_BT: inputs that are not valid count as zero.
        """
        shape = (self.kernel_size, self.num_heads, self.head_width)
        init = named(nn.initializers.normal(1 / math.sqrt(self.kernel_size)), ("window", "heads", "head"), Role.CONV)
        kernel_WHK = self.param("w", init, shape, jnp.dtype(self.precision.params)).astype(x_BTHK.dtype)
        x_BTHK = jnp.where(valid_BT[:, :, None, None], x_BTHK, jnp.zeros_like(x_BTHK))
        before = [] if tail_BWHK is None else [tail_BWHK.astype(x_BTHK.dtype)]
        all_BSHK = jnp.concatenate([*before, x_BTHK], axis=1)
        T, last = x_BTHK.shape[1], self.kernel_size - 1
        parts = [all_BSHK[:, last - j : last - j + T] * kernel_WHK[j][None, None] for j in range(self.kernel_size)]
        return functools.reduce(jnp.add, parts)


def last_valid(valid_BT: Bool[Array, "B T"], count: int) -> Int[Array, "B W"]:
    """Positions of the last `count` valid tokens of each row, in order; -1, -2, .. if there are fewer."""
    seen_B1T = jnp.cumsum(valid_BT, axis=1)[:, None]
    wanted_BW = seen_B1T[:, :, -1] - count + 1 + jnp.arange(count)[None]  # rank among valid tokens, from 1
    return jnp.where(wanted_BW >= 1, (seen_B1T < wanted_BW[:, :, None]).sum(axis=2), wanted_BW - 1)


def l2_normalize(x: Float[Array, "*lead K"]) -> Float[Array, "*lead K"]:
    """x / sqrt(|x|^2 + 1e-6), in float32 or wider."""
    wide = x.astype(at_least_float32(x.dtype))
    return wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)


class ConvProjection(nn.Module):
    """Queries, keys or values of an inner memory: x W, causal convolution, SiLU, unit length (Titans, section 4.4).

    Attributes:
      width: width D of the tokens.
      num_heads: heads H; the head width is K = D / H.
      precision: number types.
      kernel_size: of the convolution; 0 for none.
      silu: whether SiLU is applied.
      is_unit: whether the result has length 1 per head.
    """

    width: int
    num_heads: int
    precision: Precision
    kernel_size: int
    silu: bool
    is_unit: bool

    def setup(self) -> None:
        D, H, K = self.width, self.num_heads, self.width // self.num_heads
        self.w = Einsum((D, H, K), ("embed", "heads", "head"), self.precision)
        if self.kernel_size:
            self.conv = CausalConv(self.kernel_size, H, K, self.precision)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        tail_BWHK: Float[Array, "B W H K"] | None,
        valid_BT: Bool[Array, "B T"],
        dtype: jnp.dtype,
    ) -> Float[Array, "B T H K"]:
        """Projects consecutive tokens.

        Args:
          x_BTD: tokens.
          tail_BWHK: the convolution's kernel_size - 1 inputs before them, or None.
          valid_BT: inputs that are not valid count as zero in the convolution.
          dtype: type of the result.
        """
        y_BTHK = self.w("btd,dhk->bthk", x_BTD)
        if self.kernel_size:
            # The kernel reaches into the tokens of another device, and chunks need all tokens on one device anyway.
            y_BTHK = constrain(y_BTHK, ("batch", None, "heads", "head"))
            y_BTHK = self.conv(y_BTHK, tail_BWHK, valid_BT)
        y_BTHK = nn.silu(y_BTHK) if self.silu else y_BTHK
        return (l2_normalize(y_BTHK) if self.is_unit else y_BTHK).astype(dtype)

    def tail(
        self,
        x_BTD: Float[Array, "B T D"],
        old_BWHK: Float[Array, "B W H K"] | None,
        valid_BT: Bool[Array, "B T"],
    ) -> Float[Array, "B W H K"] | None:
        """The convolution's last W valid inputs after x; `old_BWHK` are those before x."""
        if old_BWHK is None:
            return None
        W = old_BWHK.shape[1]
        index_BW = last_valid(valid_BT, W)
        last_BWD = jnp.take_along_axis(x_BTD, jnp.maximum(index_BW, 0)[:, :, None], axis=1)
        new_BWHK = self.w("btd,dhk->bthk", last_BWD).astype(old_BWHK.dtype)
        index_BW11 = index_BW[:, :, None, None]
        kept_BWHK = jnp.take_along_axis(old_BWHK, jnp.clip(index_BW11 + W, 0, W - 1), axis=1)
        return jnp.where(index_BW11 >= 0, new_BWHK, kept_BWHK)


class HeadGate(nn.Module):
    """Logits of one gate per head: x W + b."""

    width: int
    num_heads: int
    precision: Precision
    bias: float = 0.0

    def setup(self) -> None:
        self.w = Einsum((self.width, self.num_heads), ("embed", "heads"), self.precision, role=Role.GATE)
        self.b = Vector((self.num_heads,), ("heads",), self.precision, fill=self.bias, role=Role.GATE)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
        """Logits in float32 or wider."""
        logit_BTH = self.w("btd,dh->bth", x_BTD)
        logit_BTH = logit_BTH.astype(at_least_float32(logit_BTH.dtype))
        return logit_BTH + self.b()[None, None].astype(logit_BTH.dtype)


class InnerNorm(nn.Module):
    """Scale and shift of the inner network's layer norm, per head."""

    num_heads: int
    head_width: int
    precision: Precision

    @nn.compact
    def __call__(self, dtype: jnp.dtype) -> NormWeights:
        """Both [H K]."""
        shape, axes, stored = (self.num_heads, self.head_width), ("heads", "head"), jnp.dtype(self.precision.params)
        scale = self.param("scale", named(nn.initializers.ones, axes, Role.NORM), shape, stored)
        shift = self.param("b", named(nn.initializers.zeros, axes, Role.NORM), shape, stored)
        return NormWeights(scale.astype(dtype), shift.astype(dtype))
