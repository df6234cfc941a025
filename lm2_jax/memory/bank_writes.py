"""Ways in which a segment becomes new slots of the gated bank."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm2_jax.attention.softmax import ExtraKV, attend_from_end
from lm2_jax.layers import Einsum, RMSNorm, SwiGLU, Vector, fsdp_gather, named, rotate
from lm2_jax.memory.bank_reads import tokens_to_slots
from lm2_jax.memory.base import Metrics, record
from lm2_jax.parameters import Role
from lm2_jax.precision import Precision, at_least_float32
from lm2_jax.registry import Family
from lm2_jax.rope import rope_frequencies
from lm2_jax.types import Array, Bool, Float

if TYPE_CHECKING:
    from lm2_jax.memory.gated_bank import GatedBankConfig

# The read of the bank by the tokens that are written: queries [B T H K], and the bank's keys and values.
BankQuery = tuple[Array, ExtraKV]


@dataclasses.dataclass(frozen=True)
class WriteConfig(Family):
    """Base of all write forms; `model.memory.write` of a run."""

    through_block: ClassVar[bool] = False  # the join sends the slots through its own block instead of giving tokens

    @property
    def normalises_tokens(self) -> bool:
        """Whether the bank normalises tokens before they query it and are written."""
        return False

    def check(self, bank: "GatedBankConfig", width: int) -> None:
        """Raises ValueError where the form does not fit the bank."""

    def build(self, bank: "GatedBankConfig", width: int, precision: Precision) -> nn.Module:
        """The module `(x_BTD, slots_BND, valid_BT, query, metrics) -> new slots [B N D]`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SlotsWrite(WriteConfig):
    """Slots attend to the segment; gates decide how much of what they found replaces what they hold."""

    kind: ClassVar[str] = "slots"
    positions: bool = True
    """RoPE on the segment's keys, with the slots' queries at its end: tells the newer of two facts."""
    codes: bool = False
    """A learned embedding per slot is added to its query, so that a slot keeps its role."""
    attend_slots: bool = True
    """Slots see each other as well as the tokens, in one softmax."""
    candidate: Literal["linear", "mlp"] = "mlp"
    """Whether an MLP computes the candidate from what a slot held and found."""
    mlp_width: int | None = None
    """Hidden width of that MLP; None: twice the width."""
    gated: bool = True
    """Input and forget gates; without them the candidate replaces the slot."""
    forget_bias: float = 1.0
    """Initial logit of the forget gate."""
    input_bias: float = 0.0
    """Initial logit of the input gate."""

    def check(self, bank: "GatedBankConfig", width: int) -> None:
        """See the base class; rotation takes pairs."""
        if self.positions:
            check_pairs(bank, width)

    def build(self, bank: "GatedBankConfig", width: int, precision: Precision) -> "SlotsWriter":
        """The module."""
        return SlotsWriter(self, bank.num_slots, bank.num_heads, width, precision)


@dataclasses.dataclass(frozen=True)
class BlockWrite(WriteConfig):
    """Slots go through the decoder block like tokens after the segment; gates decide how much of a slot is replaced."""

    kind: ClassVar[str] = "block"
    through_block: ClassVar[bool] = True
    codes: bool = True
    """A learned embedding per slot is added before it goes through the block, so that a slot keeps its role."""
    gated: bool = True
    """Input and forget gates; without them the candidate replaces the slot."""
    forget_bias: float = 1.0
    """Initial logit of the forget gate."""
    input_bias: float = 0.0
    """Initial logit of the input gate."""

    def build(self, bank: "GatedBankConfig", width: int, precision: Precision) -> "BlockWriter":
        """The module."""
        return BlockWriter(self, bank.num_slots, width, precision)


@dataclasses.dataclass(frozen=True)
class PaperWrite(WriteConfig):
    """The paper's equations 4-6; the transposed read weights bring tokens to slots."""

    kind: ClassVar[str] = "paper"
    forget_bias: float = 1.0
    """Initial logit of the forget gate (the paper is silent; the released code has +1)."""

    def build(self, bank: "GatedBankConfig", width: int, precision: Precision) -> "PaperWriter":
        """The module."""
        return PaperWriter(bank.top_k, width, precision, self.forget_bias)


@dataclasses.dataclass(frozen=True)
class ContentWrite(WriteConfig):
    """The paper's write with what tokens hold in the candidate (ours; equation 6 has only what they read)."""

    kind: ClassVar[str] = "content"
    content: bool = True
    """Tokens themselves are part of the candidate, not only what they read from the bank."""
    positions: bool = True
    """RoPE on the queries of the write, whose last token is at -1 and whose slots are at 0: tells the newer of two
    facts."""
    normalised: bool = True
    """Tokens are normalised before they query the bank and before they are written."""
    forget_bias: float = 1.0
    """Initial logit of the forget gate."""

    @property
    def normalises_tokens(self) -> bool:
        """As configured."""
        return self.normalised

    def check(self, bank: "GatedBankConfig", width: int) -> None:
        """See the base class; rotation takes pairs."""
        if self.positions:
            check_pairs(bank, width)

    def build(self, bank: "GatedBankConfig", width: int, precision: Precision) -> "PaperWriter":
        """The module."""
        return PaperWriter(bank.top_k, width, precision, self.forget_bias, self.content, self.positions)


def check_pairs(bank: "GatedBankConfig", width: int) -> None:
    """Raises ValueError where the heads of the bank have an odd width, as rotation takes pairs."""
    head_width = width // bank.num_heads
    if head_width % 2:
        raise ValueError(f"memory.write.positions needs an even head width, got {head_width}; change memory.num_heads")


def gated_update(
    slots_BND: Float[Array, "B N D"],
    candidate_BND: Float[Array, "B N D"],
    input_BND: Float[Array, "B N D"],
    forget_BND: Float[Array, "B N D"],
    metrics: Metrics | None = None,
) -> Float[Array, "B N D"]:
    """Moves each slot towards its candidate.

        M' = g_in * tanh(U) + g_forget * M,   g = sigmoid(logit)          (LM2, arXiv:2502.06049, equation 6)

    The logits are x W + b (`Gate`), in the paper x W.

    Args:
      slots_BND: M, before the segment.
      candidate_BND: U, unbounded.
      input_BND: logits of the input gate.
      forget_BND: logits of the forget gate.
      metrics: receives the mean of both gates.
    Returns:
      [B N D] in float32 at least; |M'| <= |M| + 1.
    """
    wide = at_least_float32(slots_BND.dtype)
    g_in, g_forget = jax.nn.sigmoid(input_BND.astype(wide)), jax.nn.sigmoid(forget_BND.astype(wide))
    record(metrics, gate_input=g_in, gate_forget=g_forget)
    return g_in * jnp.tanh(candidate_BND.astype(wide)) + g_forget * slots_BND.astype(wide)


class Gate(nn.Module):
    """Logits of an elementwise gate: x W + b."""

    width: int
    precision: Precision
    bias: float = 0.0

    def setup(self) -> None:
        # Sharded along the summed dimension, so that gates are sharded like their slots: not along the width.
        self.w = Einsum((self.width, self.width), ("gate_width", "embed"), self.precision, role=Role.GATE)
        self.b = Vector((self.width,), ("state_embed",), self.precision, fill=self.bias, role=Role.GATE)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """In float32 at least."""
        logit = self.w("bnd,de->bne", x)
        logit = logit.astype(at_least_float32(logit.dtype))
        return logit + self.b()[None, None].astype(logit.dtype)


class SlotsWriter(nn.Module):
    """See `SlotsWrite`."""

    config: SlotsWrite
    num_slots: int
    num_heads: int
    width: int
    precision: Precision

    def setup(self) -> None:
        c, D, H = self.config, self.width, self.num_heads
        shape, axes = (D, H, D // H), ("embed", "heads", "head")
        self.norm_slots, self.norm_tokens, self.norm_found = (RMSNorm(self.precision) for _ in range(3))
        self.q, self.k, self.v = (Einsum(shape, axes, self.precision) for _ in range(3))
        self.o = Einsum((H, D // H, D), ("heads", "head", "embed"), self.precision, in_dims=2)
        if c.codes:
            self.code = SlotCode(self.num_slots, D, self.precision)
        if c.candidate == "mlp":
            self.mlp = SwiGLU(D, c.mlp_width or 2 * D, self.precision)
        if c.gated:
            self.gate_input = Gate(D, self.precision, c.input_bias)
            self.gate_forget = Gate(D, self.precision, c.forget_bias)
        else:
            self.norm_new = RMSNorm(self.precision)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        slots_BND: Float[Array, "B N D"],
        valid_BT: Bool[Array, "B T"],
        query: Callable[[], BankQuery],
        metrics: Metrics | None,
    ) -> Float[Array, "B N D"]:
        """U = candidate(M + attention(M -> [M; X])), then the gated update (`gated_update`)."""
        c = self.config
        dtype = jnp.dtype(self.precision.compute)
        found_BND = slots_BND.astype(dtype) + self._attend(x_BTD, slots_BND, valid_BT)
        normed_BND = self.norm_found(found_BND)
        candidate_BND = self.mlp(normed_BND) if c.candidate == "mlp" else found_BND
        if not c.gated:
            return self.norm_new(found_BND + candidate_BND)
        return gated_update(
            slots_BND, candidate_BND, self.gate_input(normed_BND), self.gate_forget(normed_BND), metrics
        )

    def _attend(self, x_BTD: Array, slots_BND: Array, valid_BT: Array) -> Float[Array, "B N D"]:
        """Multi-head attention of the slots over valid tokens, and over each other if configured."""
        c, T, N = self.config, x_BTD.shape[1], self.num_slots
        frequencies = rope_frequencies(self.width // self.num_heads, 10_000.0, None)

        def heads(projection: Einsum, rows: Array, position: Array | None = None) -> Array:
            y = projection("bnd,dhk->bnhk", rows)
            return rotate(y, position, frequencies) if c.positions and position is not None else y

        # All slots are at the one position after the segment, so that positions cancel among them.
        rows_BND, normed_BTD, end_N = self.norm_slots(slots_BND), self.norm_tokens(x_BTD), jnp.full(N, T)
        q_BNHK = heads(self.q, rows_BND + self.code() if c.codes else rows_BND, end_N)
        tokens = ExtraKV(heads(self.k, normed_BTD, jnp.arange(T)), heads(self.v, normed_BTD))
        rows = ExtraKV(heads(self.k, rows_BND, end_N), heads(self.v, rows_BND)) if c.attend_slots else None
        return self.o("bnhk,hkd->bnd", attend_from_end(q_BNHK, tokens, valid_BT, rows))


class SlotCode(nn.Module):
    """A learned vector per slot."""

    num_slots: int
    width: int
    precision: Precision

    @nn.compact
    def __call__(self) -> Float[Array, "1 N D"]:
        """In the compute type."""
        axes = ("slots", "row_width")
        init = named(nn.initializers.normal(1.0), axes, Role.START)
        code_ND = self.param("code", init, (self.num_slots, self.width), jnp.dtype(self.precision.params))
        return fsdp_gather(code_ND.astype(jnp.dtype(self.precision.compute)), axes, ("slots", None))[None]


class BlockWriter(nn.Module):
    """See `BlockWrite`."""

    config: BlockWrite
    num_slots: int
    width: int
    precision: Precision

    def setup(self) -> None:
        if self.config.codes:
            self.code = SlotCode(self.num_slots, self.width, self.precision)
        self.norm = RMSNorm(self.precision)
        if self.config.gated:
            self.gate_input = Gate(self.width, self.precision, self.config.input_bias)
            self.gate_forget = Gate(self.width, self.precision, self.config.forget_bias)

    def query_rows(self, rows_BND: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Slots as they go through the block."""
        return rows_BND + self.code() if self.config.codes else rows_BND

    def __call__(
        self,
        x_BND: Float[Array, "B N D"],
        slots_BND: Float[Array, "B N D"],
        valid_BT: Bool[Array, "B T"],
        query: Callable[[], BankQuery],
        metrics: Metrics | None,
    ) -> Float[Array, "B N D"]:
        """U = norm(block(M)), then the gated update (`gated_update`) with both gates made from U."""
        candidate_BND = self.norm(x_BND)
        if not self.config.gated:
            return candidate_BND
        return gated_update(
            slots_BND, candidate_BND, self.gate_input(candidate_BND), self.gate_forget(candidate_BND), metrics
        )


class PaperWriter(nn.Module):
    """See `PaperWrite` and `ContentWrite`."""

    top_k: int | None
    width: int
    precision: Precision
    forget_bias: float
    content: bool = False
    positions: bool = False

    def setup(self) -> None:
        self.gate_input = Gate(self.width, self.precision)
        self.gate_forget = Gate(self.width, self.precision, self.forget_bias)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        slots_BND: Float[Array, "B N D"],
        valid_BT: Bool[Array, "B T"],
        query: Callable[[], BankQuery],
        metrics: Metrics | None,
    ) -> Float[Array, "B N D"]:
        """With R = A^T normalised over tokens: U = R E_mem, X = R E, M' = sig(X W + b) tanh(U) + sig(U W' + b') M.

        With content U = R (E_mem + E). With positions the queries of A are rotated by t - T; those of the read are not.

        Differs from the paper: that adds T token rows to N slot rows, which is defined for T = N only; R brings tokens
        to slots, each head its part of the width. And its gates have no biases, as the released code's have.
        """
        q_BTHK, keys = query()
        if self.positions:
            T, K = q_BTHK.shape[1], q_BTHK.shape[-1]
            q_BTHK = rotate(q_BTHK, jnp.arange(-T, 0), rope_frequencies(K, 10_000.0, None))
        brought = tokens_to_slots(q_BTHK, keys, x_BTD.reshape(q_BTHK.shape), valid_BT, self.top_k)
        candidate_BND, tokens_BND = (y_BNHK.reshape(slots_BND.shape) for y_BNHK in brought)
        if self.content:
            candidate_BND = candidate_BND + tokens_BND
        return gated_update(
            slots_BND, candidate_BND, self.gate_input(tokens_BND), self.gate_forget(candidate_BND), metrics
        )
