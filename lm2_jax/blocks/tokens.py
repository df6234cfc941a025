"""Memory tokens that travel with the segment, before it to be read and after it to be written (RMT)."""

import dataclasses
from typing import Any, ClassVar

from lm2_jax.blocks.base import BlockSpec, JoinConfig
from lm2_jax.blocks.stack import MemoryTokens
from lm2_jax.memory.base import Capability


@dataclasses.dataclass(frozen=True)
class TokensJoin(JoinConfig):
    """[memory; segment; memory] under one causal mask; the output at the last rows is the next memory.

    Differs from the paper (RMT, arXiv:2207.06881, section 3) as its released code does where the decoder is causal: in
    the paper the rows before the segment see each other, and the rows after it see everything; here each row of either
    sees the rows before its own. The segment's tokens see the same in both.
    """

    kind: ClassVar[str] = "tokens"

    def requires(self) -> tuple[Capability, ...]:
        """Rows that travel with the segment."""
        return (Capability.STACK_TOKENS,)

    def stack(self, spec: BlockSpec, **linen: Any) -> MemoryTokens:
        """The memory tokens."""
        return MemoryTokens(spec, **linen)

    def check(self, model) -> None:
        """See the base class; a window would have to skip the memory tokens between two segments."""
        super().check(model)
        if model.decoder.window_tokens is not None:
            raise ValueError("join 'tokens' has no attention window across segments; set decoder.window_tokens to None")
