"""A memory added to a pretrained decoder, with a start that changes nothing where its join allows that.

| join | start |
|---|---|
| `plain` | the decoder itself |
| `residual` | a learned scale on the memory's output starts at 0 (`join.silent_start`) |
| `gate` | the same scale, with `join.combine` of kind `add` |
| `layer` | the projection that makes the memory's output starts at 0 |
| `context` | not silent: attention sees the retrieved rows; `join.combine` is `add`, so that this is the only change |
| `tokens` | not silent: attention sees the memory tokens |
| `recall` | not silent: attention sees the recalled row and tokens of the segment before |
| `mixer` | not silent: the memory replaces attention in its layers |
| `mixed` | as its parts |

Persistent tokens are left out, because attention would see them.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from lm2_jax.blocks.base import JoinConfig
from lm2_jax.blocks.combine import Add
from lm2_jax.blocks.context import ContextJoin
from lm2_jax.blocks.gate import GateJoin
from lm2_jax.blocks.layer import LayerJoin
from lm2_jax.blocks.mixed import MixedJoin
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.config import ModelConfig
from lm2_jax.errors import UserError
from lm2_jax.memory.base import MemoryConfig


class Graft(NamedTuple):
    """A join that starts as silently as it can."""

    join: JoinConfig
    is_silent: bool  # whether the first logits are the decoder's, bit for bit in float32
    zeros: tuple[str, ...] = ()  # see `load_params`
    reason: str = ""  # why it is not silent


# What makes a memory's output: `o`, or the values of a bank, which has no `o`.
_OUTPUTS = ("memory/o/w", "memory/v/w")


def graft(
    model: ModelConfig, memory: MemoryConfig, join: JoinConfig, layers: tuple[int, ...] | None = None
) -> "Grafted":
    """A decoder's model with a memory.

    Args:
      model: of the decoder.
      memory: what is remembered.
      join: how the memory meets the decoder.
      layers: blocks that get a memory; None: as the join says.
    Raises:
      UserError: memory, join and decoder do not fit together; the message names the field.
    """
    if layers is not None:
        if not hasattr(join, "layers"):
            raise UserError(f"--layers: join {join.kind!r} has no layers to choose; leave --layers out")
        join = dataclasses.replace(join, **{"layers": layers})
    start = silent(_without_persistent(join))
    try:
        grafted = dataclasses.replace(model, memory=memory, join=start.join)
    except ValueError as error:
        raise UserError(f"this memory does not fit the decoder: {error}", status=1) from error
    return Grafted(grafted, start)


class Grafted(NamedTuple):
    """The model, and what is special about its start."""

    model: ModelConfig
    start: Graft


def _without_persistent(join: JoinConfig) -> JoinConfig:
    return dataclasses.replace(join, **{"num_persistent": 0}) if hasattr(join, "num_persistent") else join


@functools.singledispatch
def silent(join: Any) -> Graft:
    """The join with its most silent start; a join that is not known here keeps its own."""
    return Graft(join, is_silent=False, reason=f"join {join.kind!r} has no silent start")


@silent.register
def _(join: PlainJoin) -> Graft:
    return Graft(join, is_silent=True)


@silent.register
def _(join: ResidualJoin) -> Graft:
    return Graft(dataclasses.replace(join, silent_start=True), is_silent=True)


@silent.register
def _(join: GateJoin) -> Graft:
    return Graft(dataclasses.replace(join, combine=Add()), is_silent=True)


@silent.register
def _(join: LayerJoin) -> Graft:
    return Graft(join, is_silent=True, zeros=_OUTPUTS)


@silent.register
def _(join: ContextJoin) -> Graft:
    return Graft(dataclasses.replace(join, combine=Add()), False, reason="attention sees the rows that are retrieved")


@silent.register
def _(join: MixedJoin) -> Graft:
    starts = [silent(_without_persistent(part.join)) for part in join.parts]
    parts = tuple(dataclasses.replace(part, join=start.join) for part, start in zip(join.parts, starts, strict=True))
    zeros = tuple(
        f"layers/{layer}/{zero}"
        for start, part in zip(starts, join.parts, strict=True)
        for zero in start.zeros
        for layer in part.layers
    )
    reasons = "; ".join(sorted({start.reason for start in starts if start.reason}))
    silent_all = all(start.is_silent for start in starts)
    return Graft(dataclasses.replace(join, parts=parts), silent_all, zeros, reasons)
