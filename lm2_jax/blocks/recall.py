"""A row recalled from past memory embeddings around each segment; a second decoder pass makes the query (HMT)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from lm2_jax.blocks.base import BlockSpec, JoinConfig
from lm2_jax.blocks.stack import DecoderPass, StackMemory
from lm2_jax.memory.base import Capability, Metrics
from lm2_jax.memory.hierarchical import HierarchicalState
from lm2_jax.types import Array, Bool, Float, State


@dataclasses.dataclass(frozen=True)
class RecallJoin(JoinConfig):
    """[p; last tokens of the segment before; segment; p] through the decoder (HMT, arXiv:2405.06067, section 3).

    p is what the memory recalls. The output at the last row is the segment's memory embedding. What recalls p is the
    output of a second pass over [T; tokens of a segment; T] at its last row, with T the learned prompt.
    """

    kind: ClassVar[str] = "recall"
    summary: Literal["before", "published"] = "before"
    """What p is recalled with: the last memory.summary_tokens of the segment before; or, as published, the first ones
    of the segment itself, which its tokens then see before they are predicted. The latter is for comparison with the
    released code only: no run trains it, and no text can be read with it in pieces."""

    @property
    def looks_ahead(self) -> bool:
        """As published."""
        return self.summary == "published"

    def requires(self) -> tuple[Capability, ...]:
        """A memory that recalls a row with a summary."""
        return (Capability.RECALL,)

    def stack(self, spec: BlockSpec, **linen: Any) -> "RecalledRow":
        """The recalled row and the sensory tokens."""
        return RecalledRow(spec, **linen)

    def check(self, model) -> None:
        """See the base class; a window would have to skip the rows between two segments."""
        super().check(model)
        if model.decoder.window_tokens is not None:
            raise ValueError(
                "join 'recall' has no attention window across segments; set decoder.window_tokens to None and change "
                "memory.sensory_tokens"
            )


class RecalledRow(StackMemory):
    """The rows around a segment, and the second pass."""

    observes = True

    @property
    def prefix_tokens(self) -> int:
        """p and the sensory tokens."""
        memory: Any = self.spec.memory
        return 1 + memory.sensory_tokens

    @property
    def suffix_tokens(self) -> int:
        """p."""
        return 1

    @property
    def summary_tokens(self) -> int:
        """j."""
        memory: Any = self.spec.memory
        return memory.summary_tokens or max(1, self.spec.segment_tokens // 2)

    def prefix(self, state: HierarchicalState) -> Float[Array, "B N D"]:
        """p, then the sensory tokens; in a document's first segment, which has none, p is next to it."""
        p_B1D = self.memory.recall(state)
        if state.sensory is None:
            return p_B1D
        x_BKD = state.sensory.x.astype(p_B1D.dtype)
        is_first_B11 = (state.count == 0)[:, None, None]
        first, later = (jnp.concatenate(parts, axis=1) for parts in ((x_BKD, p_B1D), (p_B1D, x_BKD)))
        return jnp.where(is_first_B11, first, later)

    def prefix_valid(self, state: HierarchicalState) -> Bool[Array, "B N"] | None:
        """Hides sensory tokens that do not exist."""
        if state.sensory is None:
            return None
        p_B1 = jnp.ones((len(state.count), 1), bool)
        first_BN = jnp.concatenate([jnp.zeros_like(state.sensory.valid), p_B1], axis=1)
        later_BN = jnp.concatenate([p_B1, state.sensory.valid], axis=1)
        return jnp.where((state.count == 0)[:, None], first_BN, later_BN)

    def suffix(self, state: HierarchicalState) -> Float[Array, "B N D"]:
        """p."""
        return self.memory.recall(state)

    def update(self, state: State, shared: State, suffix_BND: Array | None, metrics: Metrics | None) -> State:
        """The output at the row after the segment."""
        assert suffix_BND is not None
        return self.memory.write(suffix_BND, state, jnp.ones(suffix_BND.shape[:2], bool), metrics)

    def preview(self, state: State, x_BTD: Array, valid_BT: Array, decode: DecoderPass) -> State:
        """As published: the query is the summary of the segment's first tokens."""
        if not self.spec.join.looks_ahead:
            return state
        return self._summarised(state, x_BTD[:, : self.summary_tokens], valid_BT[:, : self.summary_tokens], decode)

    def observe(self, state: State, x_BTD: Array, valid_BT: Array, decode: DecoderPass) -> State:
        """The sensory tokens, and the summary of the segment's last tokens for the next one."""
        if not self.spec.join.looks_ahead:
            j = self.summary_tokens
            state = self._summarised(state, x_BTD[:, -j:], valid_BT[:, -j:], decode)
        return self.memory.sense(x_BTD, state, valid_BT)

    def _summarised(self, state: State, x_BTD: Array, valid_BT: Array, decode: DecoderPass) -> State:
        """The second pass."""
        prompt_B1D = self.memory.prompt(state)
        rows_BND = jnp.concatenate([prompt_B1D, x_BTD.astype(prompt_B1D.dtype), prompt_B1D], axis=1)
        out_BND = decode(rows_BND, jnp.pad(valid_BT, ((0, 0), (1, 1)), constant_values=True))
        return self.memory.summarise(out_BND[:, -1], state)
