"""One policy for number types."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

FloatName = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True)
class Precision:
    """Which numbers have which type; softmax, norms and gates are float32 at least, whatever stands here."""

    params: FloatName = "float32"
    """Parameters."""
    compute: FloatName = "float32"
    """Activations and matrix products."""
    state: FloatName = "float32"
    """Recurrent memory state."""
    moments: FloatName = "float32"
    """Adam's first moment (the second is always float32 at least)."""
    logits: FloatName = "float32"
    """Logits and the loss."""


def prepare_numbers(precision: Precision) -> None:
    """Switches float64 on for the whole process where it is asked for, for without that jax makes float32 of it."""
    if "float64" in dataclasses.astuple(precision):
        jax.config.update("jax_enable_x64", True)


def safe(dtype: jnp.dtype | str) -> jnp.dtype:
    """`dtype`, or float32 where it is narrower: for softmax, norms and gates."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)
