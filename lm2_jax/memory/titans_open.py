"""The state of a Titans memory inside an unfinished segment."""

from typing import Any, NamedTuple

from lm2_jax.ops.ttt_chunk.chunk import FastWeights
from lm2_jax.ops.ttt_chunk.step import PartialChunk
from lm2_jax.ops.ttt_chunk.step import empty_chunk as empty_chunk
from lm2_jax.ops.ttt_chunk.step import ttt_step as feed  # noqa: F401
from lm2_jax.types import Array, Float, Int, State


class OpenTitans(NamedTuple):
    """A Titans memory after some tokens of a segment."""

    state: State  # at the segment's start
    prepared: Any  # its weights, for reads at the segment's start
    fast: FastWeights  # at the start of each row's unfinished chunk
    part: PartialChunk
    tails: Any  # as in the state, after the tokens so far
    asked: Float[Array, "B W H K"] | None  # convolution inputs of queries that read the segment's start; zero there
    end: Int[Array, " B"]  # segment length; tokens at positions from here on are padding
