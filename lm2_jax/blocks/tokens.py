"""Memory tokens that ride along with the segment, before it to be read and behind it to be written (RMT)."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from lm2_jax.blocks.base import Block, BlockSpec, Carrier, JoinConfig
from lm2_jax.memory.tokens import Tokens, TokensConfig, TokensState
from lm2_jax.types import Array, Float, State


@dataclasses.dataclass(frozen=True)
class TokensJoin(JoinConfig):
    """[memory; segment; memory] under one causal mask; the output at the last rows is the next memory.

    Differs from the paper (RMT, arXiv:2207.06881, section 3) as its released code does where the decoder is causal: in
    the paper the rows before the segment see each other, and the rows behind it all that there is; here each row of
    either sees the rows before its own. The tokens see the same in both.
    """

    kind: ClassVar[str] = "tokens"

    def memory_kinds(self) -> tuple[str, ...]:
        """Memory tokens."""
        return ("tokens",)

    def memory_layers(self, num_layers: int) -> tuple[int, ...]:
        """No block has a memory of its own."""
        return ()

    def block(self) -> type[Block]:
        """The plain block."""
        return Block

    def carrier(self, spec: BlockSpec, **linen: Any) -> "TokensCarrier":
        """The memory tokens."""
        return TokensCarrier(spec, **linen)

    def check(self, model) -> None:
        """See the base class; a window would have to skip the memory tokens between two segments."""
        super().check(model)
        if model.decoder.window_tokens is not None:
            raise ValueError("join 'tokens' has no attention window across segments; set decoder.window_tokens to None")


class TokensCarrier(Carrier):
    """The decoder reads and writes the memory tokens itself."""

    def setup(self) -> None:
        self.memory = self._memory()

    def _memory(self, **linen: Any) -> Tokens:
        assert isinstance(self.spec.memory, TokensConfig)
        return self.spec.memory.build(self.spec.decoder.width, self.spec.precision, **linen)

    @property
    def extra_tokens(self) -> int:
        """m."""
        assert isinstance(self.spec.memory, TokensConfig)
        return self.spec.memory.num_tokens

    def init_state(self, batch: int) -> TokensState:
        """Fresh rows."""
        return self._memory(parent=None).init_state(batch)

    def state_axes(self) -> TokensState:
        """As the memory's."""
        return self._memory(parent=None).state_axes()

    def tokens(self, state: TokensState) -> Float[Array, "B N D"]:
        """The same m rows before and behind the segment, as in the released code."""
        return self.memory.rows(state)

    def leave(
        self, state: TokensState, thread: State, tokens_BND: Array | None, notes: dict[str, Array]
    ) -> TokensState:
        """What the top wrote at the rows behind the segment."""
        assert tokens_BND is not None
        return self.memory.write(tokens_BND, state, jnp.ones(tokens_BND.shape[:2], bool), notes)
