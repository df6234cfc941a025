"""Number types of a model."""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from lm2_jax.fields import Since

FloatName = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True)
class Precision:
    """Number types of a run. Softmax, norms and gates are always computed in float32 or wider."""

    params: FloatName = "float32"
    """Parameters."""
    compute: FloatName = "float32"
    """Activations and matrix products."""
    state: FloatName = "float32"
    """Recurrent memory state."""
    moments: FloatName = "float32"
    """First moment of the optimizer (the second is always float32 or wider)."""
    logits: FloatName = "float32"
    """Logits and the loss."""
    master_copy: Annotated[bool, Since(2, old=lambda table: table["params"] != "bfloat16")] = True
    """Whether the optimizer keeps a float32 copy of bfloat16 parameters. Without it, updates smaller than 1/256 of a
    parameter are lost. With AdamW, a bfloat16 parameter then takes 14 bytes (2, and 4 for the copy, 8 for the moments),
    a float32 parameter 12. No effect on parameters of type float32 or float64."""


def prepare_numbers(precision: Precision) -> None:
    """Enables float64 for the process if `precision` uses it; by default jax converts float64 to float32."""
    if "float64" in dataclasses.astuple(precision):
        jax.config.update("jax_enable_x64", True)


def at_least_float32(dtype: jnp.dtype | str) -> jnp.dtype:
    """`dtype`, or float32 if `dtype` is narrower: the type of softmax, norms and gates."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)
