"""Old names of `lm2_jax.ops.ttt_chunk`."""

from typing import Any

from lm2_jax.memory.base import Notes, note
from lm2_jax.ops.ttt_chunk.chunk import ChunkInputs as Tokens
from lm2_jax.ops.ttt_chunk.chunk import ChunkSpec as Rules
from lm2_jax.ops.ttt_chunk.sharded import read_frozen as ask  # noqa: F401
from lm2_jax.ops.ttt_chunk.sharded import segment_metrics
from lm2_jax.ops.ttt_chunk.sharded import ttt_chunk as run  # noqa: F401


def note_update(notes: Notes, rules: Rules, norm: Any, after: Any, tokens: Tokens, measured: Any) -> None:
    """Adds `segment_metrics` to the notes."""
    note(notes, **segment_metrics(rules, norm, after, tokens, measured))
