"""The memory of the Hierarchical Memory Transformer (HMT, arXiv:2405.06067): a cache of past memory embeddings.

With D the model width, the state holds the last N memory embeddings M [N D], one per segment; the last k tokens of the
segment before, as they entered the decoder (sensory memory); and the summary s [D] of a segment, which the decoder made
of the learned prompt T and of tokens. The row that the next segment reads is

    p = sum_i softmax_i(W_q s . W_k M_i / sqrt(K)) M_i

and a learned row where no segment is before. The output of the decoder at the row after a segment is the segment's own
memory embedding. Values are not projected. With N = 1, p is the embedding of the segment before, as in the first of the
paper's two training stages.

Differs from the released code: it divides the scores by K instead of sqrt(K) where K and D are at least 4096.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.layers import Einsum, fsdp_gather, named
from lm2_jax.memory.base import Capability, Memory, MemoryConfig, Metrics, record
from lm2_jax.parameters import Role
from lm2_jax.precision import Precision, at_least_float32
from lm2_jax.types import Array, Bool, Float, Int

ROW_AXES = ("window", "row_width")  # of one learned row


@dataclasses.dataclass(frozen=True)
class HierarchicalConfig(MemoryConfig):
    """HMT's cache of memory embeddings, of which a segment's summary recalls one row; joined by `recall`."""

    kind: ClassVar[str] = "hierarchical"
    also_called: ClassVar[tuple[str, ...]] = ("hmt",)
    num_memories: int = 300
    """Memory embeddings N that are kept, one per segment; the oldest is replaced."""
    sensory_tokens: int = 32
    """Last tokens k of a segment that the next one sees; 0: none."""
    summary_tokens: int | None = None
    """Tokens j of a segment that its summary is made of; None: half of them."""
    key_width: int = 64
    """Width K of the keys and of the query that recall a row."""

    def __post_init__(self) -> None:
        for name in ("num_memories", "key_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"memory.{name} must be at least 1, got {getattr(self, name)}")

    def check_segment(self, segment_tokens: int) -> None:
        """Sensory tokens and those of the summary are of one segment."""
        for name, least in (("sensory_tokens", 0), ("summary_tokens", 1)):
            tokens = getattr(self, name)
            if tokens is not None and not least <= tokens <= segment_tokens:
                raise ValueError(
                    f"memory.{name}={tokens} must be between {least} and model.segment_tokens={segment_tokens}"
                )

    @property
    def capabilities(self) -> Capability:
        """A summary of a segment recalls a row."""
        return Capability.RECALL

    @property
    def stack_tokens(self) -> int:
        """The recalled row."""
        return 1

    @property
    def least_segments(self) -> int:
        """The third segment is the first that chooses: of one embedding all is recalled, whatever the query."""
        return 3 if self.num_memories > 1 else 1

    @property
    def merge_obstacle(self) -> str:
        """A part of the state belongs to one text."""
        return (
            "it holds the last tokens and the summary of one text, and no more than memory.num_memories segments of "
            "all texts together"
        )

    def build(self, width: int, precision: Precision, **linen: Any) -> "Hierarchical":
        """The module for a decoder of this width."""
        return Hierarchical(self, width, precision, **linen)


class Sensory(NamedTuple):
    """The last k tokens of a segment."""

    x: Float[Array, "B K D"]  # as they entered the decoder; zero at padding
    valid: Bool[Array, "B K"]


class HierarchicalState(NamedTuple):
    """What a segment leaves for those after it."""

    cache: Float[Array, "B N D"]  # that of segment i is at i mod N
    count: Int[Array, " B"]  # segments so far
    summary: Float[Array, "B D"]  # of the segment before
    sensory: Sensory | None  # None where k = 0
    is_start: Bool[Array, " B"]


class Hierarchical(Memory):
    """Keeps one embedding per segment and recalls one row of them."""

    config: HierarchicalConfig
    width: int
    precision: Precision

    def setup(self) -> None:
        shape, axes = (self.width, self.config.key_width), ("embed", "head")
        self.q, self.k = (Einsum(shape, axes, self.precision) for _ in range(2))
        # As in the released code: both rows have the embedding's scale.
        init = named(nn.initializers.normal(self.width**-0.5), ROW_AXES, Role.START)
        self.start_1D, self.prompt_1D = (
            self.param(name, init, (1, self.width), jnp.dtype(self.precision.params)) for name in ("start", "prompt")
        )

    def init_state(self, batch: int) -> HierarchicalState:
        """Nothing read."""
        c, dtype = self.config, jnp.dtype(self.precision.state)
        k = c.sensory_tokens
        sensory = Sensory(jnp.zeros((batch, k, self.width), dtype), jnp.zeros((batch, k), bool)) if k else None
        cache = jnp.zeros((batch, c.num_memories, self.width), dtype)
        summary = jnp.zeros((batch, self.width), dtype)
        return HierarchicalState(cache, jnp.zeros(batch, jnp.int32), summary, sensory, jnp.ones(batch, bool))

    def state_axes(self) -> HierarchicalState:
        """Split by rows; a mesh that splits slots splits the tokens of a segment too, which the join refuses."""
        window: Any = Sensory(("batch", "window", None), ("batch", "window"))  # pyright: ignore[reportArgumentType]
        return HierarchicalState(
            ("batch", "slots", None),  # pyright: ignore[reportArgumentType]
            ("batch",),  # pyright: ignore[reportArgumentType]
            ("batch", None),  # pyright: ignore[reportArgumentType]
            window if self.config.sensory_tokens else None,
            ("batch",),  # pyright: ignore[reportArgumentType]
        )

    def _learned(self, row_1D: Array, batch: int) -> Float[Array, "B 1 D"]:
        row_1D = fsdp_gather(row_1D.astype(jnp.dtype(self.precision.compute)), ROW_AXES, ("window", None))
        return jnp.broadcast_to(row_1D[None], (batch, *row_1D.shape))

    def prompt(self, state: HierarchicalState) -> Float[Array, "B 1 D"]:
        """T, around the tokens that are summarised."""
        return self._learned(self.prompt_1D, len(state.count))

    def recall(self, state: HierarchicalState) -> Float[Array, "B 1 D"]:
        """p of a state with its start, in the compute dtype."""
        wide = at_least_float32(self.precision.compute)
        cache_BND = state.cache.astype(jnp.dtype(self.precision.compute))
        q_BK, k_BNK = self.q("bd,dk->bk", state.summary), self.k("bnd,dk->bnk", cache_BND)
        scores_BN = jnp.einsum("bk,bnk->bn", q_BK, k_BNK, preferred_element_type=wide)
        is_held_BN = jnp.arange(self.config.num_memories)[None] < state.count[:, None]
        # A row that holds nothing has equal weights on zeros, so that no gradient of it is NaN.
        scores_BN = jnp.where(is_held_BN, scores_BN / math.sqrt(self.config.key_width), jnp.finfo(wide).min)
        weights_BN = jax.nn.softmax(scores_BN, axis=-1).astype(cache_BND.dtype)
        found_BD = jnp.einsum("bn,bnd->bd", weights_BN, cache_BND)
        is_first_B11 = (state.count == 0)[:, None, None]
        return jnp.where(is_first_B11, self._learned(self.start_1D, len(state.count)), found_BD[:, None])

    def write(
        self,
        x_BTD: Float[Array, "B 1 D"],
        state: HierarchicalState,
        valid_BT: Bool[Array, "B 1"],
        metrics: Metrics | None = None,
    ) -> HierarchicalState:
        """The decoder's output at the row after the segment takes the place of the oldest embedding."""
        record(metrics, state_norm=jnp.linalg.norm(x_BTD.astype(jnp.float32), axis=-1))
        N = self.config.num_memories
        is_place_BN = jnp.arange(N)[None] == (state.count % N)[:, None]
        cache_BND = jnp.where(is_place_BN[:, :, None], x_BTD.astype(state.cache.dtype), state.cache)
        return state._replace(cache=cache_BND, count=state.count + 1)

    def sense(
        self, x_BTD: Float[Array, "B T D"], state: HierarchicalState, valid_BT: Bool[Array, "B T"]
    ) -> HierarchicalState:
        """The segment's last tokens become the sensory memory of the next one."""
        if state.sensory is None:
            return state
        x_BKD, valid_BK = x_BTD[:, -self.config.sensory_tokens :], valid_BT[:, -self.config.sensory_tokens :]
        x_BKD = jnp.where(valid_BK[:, :, None], x_BKD, 0).astype(state.sensory.x.dtype)
        return state._replace(sensory=Sensory(x_BKD, valid_BK))

    def summarise(self, summary_BD: Float[Array, "B D"], state: HierarchicalState) -> HierarchicalState:
        """The decoder's output after the prompt is what the next recall asks with."""
        return state._replace(summary=summary_BD.astype(state.summary.dtype))
