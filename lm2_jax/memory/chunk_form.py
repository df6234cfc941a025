"""Old names of `lm2_jax.ops.ttt_chunk.chunk`."""

from lm2_jax.ops.ttt_chunk.chunk import FastWeights as Fast  # noqa: F401
from lm2_jax.ops.ttt_chunk.chunk import Network as Network
from lm2_jax.ops.ttt_chunk.chunk import Rates as Rates
