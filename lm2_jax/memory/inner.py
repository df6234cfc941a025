"""Old import path of `lm2_jax.ops.ttt_chunk.networks`."""

from lm2_jax.ops.ttt_chunk.networks import *  # noqa: F403
