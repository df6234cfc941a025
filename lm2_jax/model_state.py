"""What goes in and out of `LanguageModel`, and which of its blocks run as one loop."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from lm2_jax.attention.cache import Cache
from lm2_jax.blocks.ports import OpenLayer
from lm2_jax.config import ModelConfig
from lm2_jax.types import Array, Float, Int, State


class ModelState(NamedTuple):
    """Everything that crosses a segment border."""

    groups: tuple[State, ...]  # per group of equal blocks, the layers axis first
    stack: State  # of the stack's memory, or None


class StreamState(NamedTuple):
    """A model inside an unfinished segment; rows may be at different positions."""

    position: Int[Array, " B"]  # tokens of the open segment so far
    state: ModelState  # at the segment's start
    groups: tuple[OpenLayer, ...]
    kept: Float[Array, "B T D"] | None  # the segment's tokens as they enter the blocks, where the stack observes them


class Output(NamedTuple):
    """What `forward` returns."""

    hidden: Float[Array, "B S D"]  # normalised, as the head takes it
    logits: Float[Array, "B S V"] | None
    state: ModelState
    aux: dict[str, Array]  # diagnostics by name, one value per layer


class LayerGroup(NamedTuple):
    """Consecutive equal blocks, which run as one loop."""

    first: int
    length: int


def layer_groups(config: ModelConfig) -> list[LayerGroup]:
    """The blocks in groups of equal ones."""
    groups: list[LayerGroup] = []
    for layer in range(config.decoder.num_layers):
        if groups and config.block_of(groups[-1].first) == config.block_of(layer):
            groups[-1] = groups[-1]._replace(length=groups[-1].length + 1)
        else:
            groups.append(LayerGroup(layer, 1))
    return groups


def first_cache(groups: Sequence[State]) -> Cache | None:
    """The keys of a document in the first block that keeps them; None where none does."""
    for group in groups:
        if isinstance(group.window, Cache):
            return jax.tree.map(lambda a: a[0], group.window)
    return None


def check_rows(rows: int, batch: int) -> None:
    """Raises ValueError where a state has other rows than the tokens."""
    if rows != batch:
        raise ValueError(f"state has {rows} rows, tokens have {batch}; make it with init_state(batch={batch})")
