"""Memory tokens that travel with the segment, before it to be read and after it to be written (RMT)."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from lm2_jax.blocks.base import BlockSpec, JoinConfig
from lm2_jax.blocks.stack import MemoryTokens
from lm2_jax.fields import Since
from lm2_jax.memory.base import Capability


@dataclasses.dataclass(frozen=True)
class TokensJoin(JoinConfig):
    """[memory; segment; memory], the same rows twice; the output at the last ones is the next memory (RMT).

    arXiv:2207.06881, section 3. The segment's tokens see the rows before it, and each other causally.
    """

    kind: ClassVar[str] = "tokens"
    mask: Annotated[Literal["causal", "mutual"], Since(3)] = "causal"
    """What memory rows see: the rows before their own, as in the released code for causal decoders; or all memory rows
    on their side of the segment too, as in the paper."""

    def requires(self) -> tuple[Capability, ...]:
        """Rows that travel with the segment."""
        return (Capability.STACK_TOKENS,)

    def mutual_rows(self, spec: BlockSpec) -> tuple[tuple[int, int], ...]:
        """The rows before the segment, and those after it."""
        if self.mask == "causal":
            return ()
        m, end = spec.memory.stack_tokens, spec.memory.stack_tokens + spec.segment_tokens
        return ((0, m), (end, end + m))

    def stack(self, spec: BlockSpec, **linen: Any) -> MemoryTokens:
        """The memory tokens."""
        return MemoryTokens(spec, **linen)

    def check(self, model) -> None:
        """See the base class; a window would have to skip the memory tokens between two segments."""
        super().check(model)
        if model.decoder.window_tokens is not None:
            raise ValueError("join 'tokens' has no attention window across segments; set decoder.window_tokens to None")
