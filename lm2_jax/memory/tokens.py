"""Memory tokens of the Recurrent Memory Transformer (arXiv:2207.06881): the state is what the top layer wrote."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.layers import fsdp_gather, named
from lm2_jax.memory.base import Capability, Memory, MemoryConfig, Metrics, record
from lm2_jax.parameters import Role
from lm2_jax.precision import Precision
from lm2_jax.types import Array, Bool, Float

START_AXES = ("slots", "row_width")


@dataclasses.dataclass(frozen=True)
class TokensConfig(MemoryConfig):
    """RMT's memory tokens; joined by `tokens`."""

    kind: ClassVar[str] = "tokens"
    also_called: ClassVar[tuple[str, ...]] = ("rmt",)
    num_tokens: int = 16
    """Memory tokens m; they are before the segment to be read and after it to be written."""

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"memory.num_tokens must be at least 1, got {self.num_tokens}")

    @property
    def capabilities(self) -> Capability:
        """The decoder reads and writes the tokens itself."""
        return Capability.STACK_TOKENS

    @property
    def stack_tokens(self) -> int:
        """m."""
        return self.num_tokens

    @property
    def merge_obstacle(self) -> str:
        """The rows are no sum over what was read."""
        return (
            "memory tokens are what the decoder wrote at their places, which is no sum over texts, and the decoder "
            "takes no more than memory.num_tokens of them"
        )

    def build(self, width: int, precision: Precision, **linen: Any) -> "Tokens":
        """The module for a decoder of this width."""
        return Tokens(self, width, precision, **linen)


class TokensState(NamedTuple):
    """Memory tokens as they enter the bottom of the next segment."""

    tokens: Float[Array, "B N D"]
    is_start: Bool[Array, " B"]


class Tokens(Memory):
    """m rows that the decoder itself reads and writes; they start as learned vectors."""

    config: TokensConfig
    width: int
    precision: Precision

    def setup(self) -> None:
        # As in the released code: the start has the embedding's scale.
        init = named(nn.initializers.normal(self.width**-0.5), START_AXES, Role.START)
        self.start_ND = self.param(
            "start", init, (self.config.num_tokens, self.width), jnp.dtype(self.precision.params)
        )

    def init_state(self, batch: int) -> TokensState:
        """Fresh rows."""
        shape = (batch, self.config.num_tokens, self.width)
        return TokensState(jnp.zeros(shape, jnp.dtype(self.precision.state)), jnp.ones(batch, bool))

    def state_axes(self) -> TokensState:
        """Memory tokens are sharded like any token: by batch."""
        return TokensState(("batch", "slots", None), ("batch",))  # pyright: ignore[reportArgumentType]

    def start_state(self) -> TokensState:
        """The learned rows."""
        state = self.init_state(1)
        start_ND = fsdp_gather(self.start_ND.astype(state.tokens.dtype), START_AXES, ("slots", None))
        return state._replace(tokens=start_ND[None])

    def rows(self, state: TokensState) -> Float[Array, "B N D"]:
        """The m rows, in the compute dtype."""
        return state.tokens.astype(jnp.dtype(self.precision.compute))

    def write(
        self,
        x_BTD: Float[Array, "B N D"],
        state: TokensState,
        valid_BT: Bool[Array, "B N"],
        metrics: Metrics | None = None,
    ) -> TokensState:
        """The decoder's output at the m write positions becomes the memory."""
        record(metrics, state_norm=jnp.linalg.norm(x_BTD.astype(jnp.float32), axis=-1))
        return state._replace(tokens=x_BTD.astype(state.tokens.dtype))
