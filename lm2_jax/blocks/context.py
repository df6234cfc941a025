"""Memory as context: attention sees what was retrieved in addition to the segment; its output is written (MAC)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from lm2_jax.attention import ExtraKV, Projected
from lm2_jax.blocks.base import PersistentTokens
from lm2_jax.blocks.combine import CombineConfig, Product
from lm2_jax.blocks.memory_block import MemoryBlock, RunningJoin
from lm2_jax.layers import RMSNorm
from lm2_jax.memory.base import Capability, MemoryConfig
from lm2_jax.types import Array, Float, State


@dataclasses.dataclass(frozen=True)
class ContextJoin(RunningJoin):
    """y = Attention([P; retrieved; n(x)]), h = x + combine(y, M(n(x + y))) (arXiv:2501.00663, equations 21-25).

    The paper writes y and does not say where its residual connections run. Here the memory takes x + y, which keeps the
    token itself; `source` can be y alone, which learned a little less (docs/design.md).

    Two readings of the paper would show a token its future and are not implemented:

    - a retrieved row is made from its token, so only that token and later ones see it;
    - M(y) at a token uses what tokens up to it have written, not what the full segment has.
    """

    kind: ClassVar[str] = "context"
    retrieve: Literal["tokens", "rows", "queries"] = "tokens"
    """What attention sees of the memory as it was before the segment: its answer to each token, at the token's position
    (the paper); or, at the segment's start, all rows of a memory that has rows, or its answers to learned queries, the
    same for all texts."""
    num_queries: int = 0
    """Learned queries, with retrieve='queries'."""
    source: Literal["stream", "attention"] = "stream"
    """What the memory takes of a token: n(x + y), which keeps the token itself, or n(y) alone."""
    combine: CombineConfig = Product()
    """How attention and what is read back become one."""

    def block(self) -> type["ContextBlock"]:
        """The block of a layer with memory."""
        return ContextBlock

    def requires(self) -> tuple[Capability, ...]:
        """As the base class, and read before the segment."""
        return (Capability.READ | Capability.RUNNING, Capability.READ | Capability.WRITE)

    def takes_packed(self, memory: MemoryConfig) -> bool:
        """What is retrieved for a segment belongs to one document."""
        return False

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
        if Capability.ROWS not in model.memory.capabilities:
            raise ValueError(
                f"join.retrieve='rows' needs a memory with rows, {model.memory.kind!r} has none; set it to 'tokens'"
            )
        if model.memory.top_k is not None:
            raise ValueError(
                "join.retrieve='rows' shows all rows; set memory.top_k to None or join.retrieve to 'tokens'"
            )


class ContextBlock(MemoryBlock):
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

    @property
    def reads(self) -> bool:
        """Where each token retrieves a row."""
        return self.join.retrieve == "tokens"

    @property
    def makes_own_keys(self) -> bool:
        """A key for each retrieved row."""
        return self.reads

    def prepare(self, memory: State) -> ExtraKV | None:
        """What is retrieved for all tokens alike: the memory's rows, or its answers to learned queries."""
        if self.join.retrieve == "tokens":
            return None
        if self.join.retrieve == "rows":
            rows_BND = self.memory.rows(memory)
        else:
            queries_1ND = self.attention_norm(self.queries())
            queries_BND = jnp.broadcast_to(queries_1ND, (len(memory.is_start), *queries_1ND.shape[1:]))
            rows_BND, _ = self.memory.read(
                queries_BND, jnp.ones(queries_BND.shape[:2], bool), self.memory.reader(memory)
            )
        return self.attention.kv(self.retrieved_norm(rows_BND))

    def flow(self, x: Array, port: Any) -> Array:
        """See `ContextJoin`; all but the MLP runs segment by segment."""
        normed = self.attention_norm(x)
        o = port.each_segment(ContextBlock.through_memory, x, normed, port.project(normed))
        return self.feed_forward(x + o)

    def through_memory(
        self, port: Any, x_BTD: Float[Array, "B T D"], normed_BTD: Float[Array, "B T D"], projected: Projected
    ) -> Float[Array, "B T D"]:
        """What one segment adds to the residual stream."""
        own = port.own_keys(self.retrieved_norm(port.read(normed_BTD))) if self.reads else None
        y_BTD = self.attention.output(port.attend(projected, port.prepared, own))
        m_BTD = port.remember(self.written_norm(x_BTD + y_BTD if self.join.source == "stream" else y_BTD))
        return self.combine(y_BTD, m_BTD, port.metrics)
