"""LM2's memory: a bank of slots, read by attention and written through input and forget gates (arXiv:2502.06049)."""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm2_jax.attention.softmax import ExtraKV
from lm2_jax.layers import Einsum, RMSNorm, constrain, fsdp_gather, named
from lm2_jax.memory.bank_reads import attend_slots, slot_weights
from lm2_jax.memory.bank_writes import BlockWrite, WriteConfig
from lm2_jax.memory.base import READ_WEIGHTS, Capability, Memory, MemoryConfig, Metrics, record, reveal
from lm2_jax.parameters import Role
from lm2_jax.precision import Precision
from lm2_jax.types import Array, Bool, Float

SLOT_AXES, START_AXES = ("batch", "slots", None), ("slots", "row_width")


@dataclasses.dataclass(frozen=True)
class GatedBankConfig(MemoryConfig):
    """LM2's gated bank of slots, as wide as the decoder."""

    kind: ClassVar[str] = "gated_bank"
    also_called: ClassVar[tuple[str, ...]] = ("lm2",)
    optional_capabilities: ClassVar[Capability] = Capability.WRITE
    num_slots: int = 16
    """Slots N; independent of segment length and width."""
    num_heads: int = 4
    """Heads of the bank's own attention, to read and to write."""
    top_k: int | None = None
    """Each query sees only its k best slots, chosen before the softmax; None: all."""
    start: Literal["identity", "learned"] = "identity"
    """What a document begins with: row j is the one-hot e_j, or a parameter that is initialised to it."""
    norm_slots: bool = True
    """Whether slots are normalised before they are projected (the paper does not)."""
    write: WriteConfig = BlockWrite()
    """How a segment becomes new slots."""

    def __post_init__(self) -> None:
        if self.num_slots < 1:
            raise ValueError(f"memory.num_slots must be at least 1, got {self.num_slots}")
        if self.num_heads < 1:
            raise ValueError(f"memory.num_heads must be at least 1, got {self.num_heads}")
        if self.top_k is not None and not 1 <= self.top_k <= self.num_slots:
            raise ValueError(f"memory.top_k={self.top_k} must lie between 1 and memory.num_slots={self.num_slots}")

    @property
    def capabilities(self) -> Capability:
        """Slots answer each token for itself; a learned start cannot be shared by layers."""
        write = Capability.WRITE_THROUGH_BLOCK if self.write.through_block else Capability.WRITE
        shareable = Capability.SHAREABLE if self.start == "identity" else Capability.NONE
        return Capability.READ | Capability.ROWS | Capability.PACKED | write | shareable

    @property
    def merge_obstacle(self) -> str:
        """The number of slots is a property of the model."""
        return (
            "slots do not add up, and the banks of two texts side by side have more slots than this model's "
            f"memory.num_slots={self.num_slots}, which is part of the model"
        )

    def build(self, width: int, precision: Precision, **linen: Any) -> "GatedBank":
        """The module for a decoder of this width."""
        if width % self.num_heads:
            raise ValueError(f"decoder.width={width} is not a multiple of memory.num_heads={self.num_heads}")
        self.write.check(self, width)
        return GatedBank(self, width, precision, **linen)


class BankState(NamedTuple):
    """The bank between two segments."""

    slots: Float[Array, "B N D"]
    is_start: Bool[Array, " B"]


def identity_rows(num_slots: int, width: int) -> np.ndarray:
    """[N D] distinct unit rows: e_0 .. e_{D-1}, then fixed random directions.

    Identical rows would receive identical updates and never diverge, so the identity cannot simply repeat.
    """
    rows_ND = np.eye(num_slots, width)
    extra_MD = np.random.default_rng(2502_06049).standard_normal((max(num_slots - width, 0), width))
    rows_ND[width:] = extra_MD / np.linalg.norm(extra_MD, axis=-1, keepdims=True)
    return rows_ND


class GatedBank(Memory):
    """N slots of the decoder's width."""

    config: GatedBankConfig
    width: int
    precision: Precision

    def setup(self) -> None:
        c, D, H = self.config, self.width, self.config.num_heads
        if c.start == "learned":
            rows_ND = identity_rows(c.num_slots, D)
            init = named(lambda _, shape, dtype: jnp.asarray(rows_ND, dtype), START_AXES, Role.START)
            self.start_ND = self.param("start", init, rows_ND.shape, jnp.dtype(self.precision.params))
        self.norm = RMSNorm(self.precision) if c.norm_slots else None
        self.norm_tokens = RMSNorm(self.precision) if c.write.normalises_tokens else None
        shape, axes = (D, H, D // H), ("embed", "heads", "head")
        self.q = Einsum(shape, axes, self.precision)
        self.k = Einsum(shape, axes, self.precision)
        self.v = Einsum(shape, axes, self.precision)
        self.writer = c.write.build(c, D, self.precision)

    def init_state(self, batch: int) -> BankState:
        """Fresh rows."""
        shape = (batch, self.config.num_slots, self.width)
        return BankState(jnp.zeros(shape, jnp.dtype(self.precision.state)), jnp.ones(batch, bool))

    def state_axes(self) -> BankState:
        """Slots are an axis of their own."""
        return BankState(SLOT_AXES, ("batch",))  # pyright: ignore[reportArgumentType]

    def start_state(self) -> BankState:
        """The identity, or the learned rows."""
        state = self.init_state(1)
        if self.config.start == "learned":
            start_ND = fsdp_gather(self.start_ND.astype(state.slots.dtype), START_AXES, ("slots", None))
        else:
            start_ND = jnp.asarray(identity_rows(self.config.num_slots, self.width), state.slots.dtype)
        return state._replace(slots=start_ND[None])

    def rows(self, state: BankState) -> Float[Array, "B N D"]:
        """The slots as they are projected: normalised if configured, in the compute dtype."""
        dtype = jnp.dtype(self.precision.compute)
        return state.slots.astype(dtype) if self.norm is None else self.norm(state.slots)

    def tokens(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Tokens as they query the bank and are written: normalised if the write form says so."""
        return x_BTD if self.norm_tokens is None else self.norm_tokens(x_BTD)

    def query_rows(self, state: BankState) -> Float[Array, "B N D"]:
        """`rows` with the slot embeddings of the write form."""
        return self.writer.query_rows(self.rows(state))

    def reader(self, state: BankState) -> ExtraKV:
        """Keys and values of all slots."""
        rows_BND = self.rows(state)
        return ExtraKV(self.k("bnd,dhk->bnhk", rows_BND), self.v("bnd,dhk->bnhk", rows_BND))

    def read(
        self,
        q_BTD: Float[Array, "B T D"],
        valid_BT: Bool[Array, "B T"],
        reader: ExtraKV,
        metrics: Metrics | None = None,
    ) -> tuple[Float[Array, "B T D"], ExtraKV]:
        """E_mem = softmax(E W_q (M W_k)^T / sqrt(K)) M W_v, heads concatenated (equations 1 and after).

        See `Memory.read`. Differs from the paper: no causal mask over slots, as all of them hold past segments.
        """
        q_BTHK = self.q("btd,dhk->bthk", self.tokens(q_BTD))
        y_BTHK = attend_slots(q_BTHK, reader, self.config.top_k, metrics)
        reveal(self, READ_WEIGHTS, lambda: slot_weights(q_BTHK, reader.k, self.config.top_k))
        return y_BTHK.reshape(q_BTD.shape), reader

    def write(
        self,
        x_BTD: Float[Array, "B T D"],
        state: BankState,
        valid_BT: Bool[Array, "B T"],
        metrics: Metrics | None = None,
    ) -> BankState:
        """The bank after a segment, by the configured write form; see `bank_writes`."""
        x_BTD = self.tokens(x_BTD)

        def query() -> tuple[Array, ExtraKV]:
            return self.q("btd,dhk->bthk", x_BTD), self.reader(state)

        new_BND = self.writer(x_BTD, state.slots, valid_BT, query, metrics)
        record(metrics, state_norm=jnp.linalg.norm(new_BND.astype(jnp.float32), axis=-1))
        return state._replace(slots=constrain(new_BND.astype(state.slots.dtype), SLOT_AXES))
