"""Memory as context: attention sees what was retrieved beside the segment, and its output is written (Titans' MAC)."""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.attention import Asked, Beside
from lm2_jax.blocks.base import (
    Carry,
    Context,
    LayerState,
    OpenLayer,
    PersistentTokens,
    Place,
    any_valid,
    by_segment,
)
from lm2_jax.blocks.combine import CombineConfig, Product
from lm2_jax.blocks.per_layer import PerLayerBlock, PerLayerJoin
from lm2_jax.layers import RMSNorm, constrain
from lm2_jax.memory.base import Memory
from lm2_jax.state import select_rows
from lm2_jax.types import Array, Bool, Float, State


@dataclasses.dataclass(frozen=True)
class ContextJoin(PerLayerJoin):
    """y = Attention([P; retrieved; n(x)]), h = x + combine(y, M(n(x + y))) (arXiv:2501.00663, equations 21-25).

    The paper writes y and does not say where its residual connections run. Here the memory is given x + y, so that a
    token does not lose what it was; `source` can be y alone, which learned a little less (docs/design.md).

    Two readings of the paper would show a token its future, and are not taken:

    - a retrieved row is made from its token, so it is seen from that token on, not by the whole segment;
    - M(y) at a token uses what tokens up to it have written, not what the whole segment has.
    """

    kind: ClassVar[str] = "context"
    retrieve: Literal["tokens", "rows", "queries"] = "tokens"
    """What attention sees of the memory as it stood before the segment: its answer to each token, standing where the
    token stands (the paper); or, standing at the segment's start, all rows of a memory that has such, or its answers
    to learned queries, the same for all texts."""
    num_queries: int = 0
    """Learned queries, with retrieve='queries'."""
    source: Literal["stream", "attention"] = "stream"
    """What the memory is written with and asked: n(x + y), in which a token still is what it was, or n(y) alone."""
    combine: CombineConfig = Product()
    """How attention and what is read back become one."""

    def block(self) -> type["ContextBlock"]:
        """The block of a layer with memory."""
        return ContextBlock

    def check(self, model) -> None:
        """See the base class."""
        super().check(model)
        if (self.num_queries > 0) != (self.retrieve == "queries"):
            raise ValueError(
                f"join.num_queries={self.num_queries} does not go with join.retrieve={self.retrieve!r}: it must be at "
                "least 1 with 'queries', and 0 else"
            )
        if self.retrieve != "rows":
            return
        memory = model.memory.build(model.decoder.width, model.precision, parent=None)
        if type(memory).rows is Memory.rows:
            raise ValueError(
                f"join.retrieve='rows' needs a memory with rows, {model.memory.kind!r} has none; set it to 'tokens'"
            )
        if memory.top_k is not None:
            raise ValueError(
                "join.retrieve='rows' shows all rows; set memory.top_k to None or join.retrieve to 'tokens'"
            )


class Step(NamedTuple):
    """Inputs of one segment."""

    x: Float[Array, "B T D"]
    normed: Float[Array, "B T D"]
    asked: Asked
    valid: Bool[Array, "B T"]
    reset: Bool[Array, " B"]


class ContextBlock(PerLayerBlock):
    """Read, attend, write and read back, then the MLP."""

    def setup_join(self) -> None:
        d, precision = self.spec.decoder, self.spec.precision
        self.retrieved_norm, self.written_norm = (RMSNorm(precision, d.norm_epsilon) for _ in range(2))
        self.combine = self.join.combine.build(d.width, precision)
        if self.join.retrieve == "queries":
            self.queries = PersistentTokens(self.join.num_queries, d.width, precision)

    @property
    def join(self) -> ContextJoin:
        """The join's config."""
        assert isinstance(self.spec.join, ContextJoin)
        return self.spec.join

    def always(self, memory: State) -> Beside | None:
        """Persistent tokens, and what is retrieved for all tokens alike: the memory's rows, or answers to queries."""
        persistent = self.visible()
        if self.join.retrieve == "tokens":
            return persistent
        if self.join.retrieve == "rows":
            rows_BND = self.memory.rows(memory)
        else:
            queries_1ND = self.attention_norm(self.queries())
            shape = (self.memory.rows_of(memory), *queries_1ND.shape[1:])
            rows_BND = self.memory.read(jnp.broadcast_to(queries_1ND, shape), memory)
        assert rows_BND is not None
        rows = self.attention.beside(self.retrieved_norm(rows_BND))
        if persistent is None:
            return rows
        beside = zip(persistent, rows, strict=True)
        return Beside(*(jnp.concatenate([jnp.broadcast_to(p, (len(r), *p.shape[1:])), r], axis=1) for p, r in beside))

    def written(self, x: Float[Array, "*lead D"], y: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        """What the memory is given of a token and of what attention made of it."""
        return self.written_norm(x + y if self.join.source == "stream" else y)

    def forward(
        self, carry: Carry, state: LayerState, context: Context
    ) -> tuple[Carry, tuple[LayerState, dict[str, Array]]]:
        """Projections of all segments at once, then segment by segment what meets the memory, then the MLP of all."""
        segments, here = context.segments, jnp.arange(self.spec.segment_tokens)
        normed_BJTD = self.attention_norm(carry.x)
        asked, window = self.attention.project(normed_BJTD, state.window, segments)

        def step(block: "ContextBlock", memory: State, inputs: tuple[Step, Array]) -> tuple[State, Any]:
            segment, cut = inputs
            memory, notes = block.at_border(memory, segment.reset, cut), {}
            own = None
            if block.join.retrieve == "tokens":
                asking_BTD = jnp.where(segment.valid[:, :, None], segment.normed, 0)
                retrieved_BTD = block.memory.read(asking_BTD, memory, notes=notes)
                own = block.attention.beside(block.retrieved_norm(retrieved_BTD), here)
            y_BTD = block.attention.meet(segment.asked, block.always(memory), own).y
            m_BTD, after = block.memory(block.written(segment.x, y_BTD), memory, segment.valid, notes)
            memory = select_rows(any_valid(segment.valid), after, memory, block._memory_axes())
            return memory, (block.combine(y_BTD, m_BTD, notes), notes)

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        per_segment = by_segment(Step(carry.x, normed_BJTD, asked, segments.valid, segments.reset))
        memory, (o_JBTD, notes) = scan(self, state.memory, (per_segment, segments.cut))
        x_BJTD = self.feed_forward(carry.x + by_segment(o_JBTD))
        x_BJTD = constrain(x_BJTD, ("batch", "segments", "time", "embed"))
        return carry._replace(x=x_BJTD), (LayerState(window, memory), jax.tree.map(jnp.mean, notes))

    def open(
        self, span_BT: Float[Array, "B T"], state: LayerState, start: State
    ) -> tuple[Float[Array, "B T"], OpenLayer]:
        """See the base class."""
        always, with_own = self.always(state.memory), self.join.retrieve == "tokens"
        attention = self.attention.open(state.window, len(span_BT), span_BT.shape[1], always, with_own)
        return span_BT, OpenLayer(attention, self.open_memory(state.memory))

    def extend(
        self, x_BSD: Float[Array, "B S D"], state: OpenLayer, place: Place
    ) -> tuple[Float[Array, "B S D"], OpenLayer]:
        """See the base class."""
        assert state.attention is not None
        normed_BSD, memory, own = self.attention_norm(x_BSD), state.memory, None
        if self.join.retrieve == "tokens":
            retrieved_BSD, memory = self.memory.ask(normed_BSD, place.buffer, memory)
            own = self.attention.beside(self.retrieved_norm(retrieved_BSD), place.position)
        attended, attention = self.attention.extend(normed_BSD, place.position, place.slot, state.attention, own)
        m_BSD, memory = self.memory.extend(self.written(x_BSD, attended.y), place.buffer, memory)
        return self.feed_forward(x_BSD + self.combine(attended.y, m_BSD, {})), OpenLayer(attention, memory)
