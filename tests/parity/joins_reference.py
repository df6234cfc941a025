"""The joins `context`, `gate`, `layer` and `mixer`, here with a bank, and persistent tokens; see `reference`."""

from typing import Any

import numpy as np

from lm2_jax.memory.bank_writes import ContentWrite, PaperWrite, SlotsWrite
from tests.parity.reference import (
    Past,
    Reference,
    attended,
    decoder_norm,
    heads,
    merged,
    mlp,
    rms_norm,
    rotated,
    sigmoid,
    with_bias,
)

Rows = list[np.ndarray]  # [D] each

# Joins whose persistent tokens begin a document's memory, and the norm that they go through.
OPENING = {"gate": "attention", "layer": "memory", "mixer": "memory"}


class JoinsReference(Reference):
    """Blocks that keep a memory each; all other models are left to the base."""

    def fresh(self, p: dict[str, Any]) -> Any:
        """The memory before anything was written."""
        return super().first_memory(p)

    def first_memory(self, p: dict[str, Any]) -> Any:
        """As persistent tokens leave it, where they are written."""
        norm = OPENING.get(self.config.join.kind)
        if "persistent" not in p or norm is None:
            return self.fresh(p)
        return self.written(p, self.normed(p, norm, p["persistent"]["start"]), self.fresh(p))

    def normed(self, p: dict[str, Any], name: str, x: np.ndarray) -> np.ndarray:
        return decoder_norm(x, p[f"{name}_norm"], self.config.decoder.norm_epsilon)

    def block(self, p: dict[str, Any], x_TD: np.ndarray, begin: int, past: Past, bank: Any, written: Any) -> Any:
        """See the base class."""
        kind = "plain" if bank is None else self.config.join.kind
        join = getattr(self, kind, None)
        if join is None:
            return super().block(p, x_TD, begin, past, bank, written)
        h_TD, bank = join(p, x_TD, begin, past, bank)
        return h_TD + mlp(self.normed(p, "mlp", h_TD), p["mlp"]), bank

    def plain(self, p: dict[str, Any], x_TD: np.ndarray, begin: int, past: Past, bank: Any) -> Any:
        return x_TD + self.attention(p, self.normed(p, "attention", x_TD), begin, past, self.persistent(p)), None

    def gate(self, p: dict[str, Any], x_TD: np.ndarray, begin: int, past: Past, bank: Any) -> Any:
        """Equations 26-28."""
        n_TD = self.normed(p, "attention", x_TD)
        y_TD = self.attention(p, n_TD, begin, past, self.persistent(p))
        m_TD, bank = self.running(p, n_TD, bank)
        return x_TD + self.combined(p, y_TD, m_TD), bank

    def layer(self, p: dict[str, Any], x_TD: np.ndarray, begin: int, past: Past, bank: Any) -> Any:
        """Equations 29-31, with residual connections."""
        n_TD, always = self.normed(p, "memory", x_TD), []
        if "persistent" in p:
            rows_ND = p["persistent"]["start"]
            rows_ND = rows_ND + self.running(p, self.normed(p, "memory", rows_ND), self.fresh(p))[0]
            always = list(self.normed(p, "attention", rows_ND))
        m_TD, bank = self.running(p, n_TD, bank)
        h_TD = x_TD + m_TD
        return h_TD + self.attention(p, self.normed(p, "attention", h_TD), begin, past, always), bank

    def mixer(self, p: dict[str, Any], x_TD: np.ndarray, begin: int, past: Past, bank: Any) -> Any:
        """Section 4.3."""
        m_TD, bank = self.running(p, self.normed(p, "memory", x_TD), bank)
        return x_TD + m_TD, bank

    def context(self, p: dict[str, Any], x_TD: np.ndarray, begin: int, past: Past, bank: Any) -> Any:
        """Equations 21-25; row j of what was retrieved is seen by tokens from j on."""
        n_TD, always, own = self.normed(p, "attention", x_TD), self.persistent(p), None
        if self.config.join.retrieve == "rows":
            always = always + list(self.normed(p, "retrieved", self.rows(p, bank)))
        elif self.config.join.retrieve == "queries":
            queries_ND = self.normed(p, "attention", p["queries"]["start"])
            always = always + list(self.normed(p, "retrieved", self.asked(p, queries_ND, bank)))
        else:
            own = self.normed(p, "retrieved", self.asked(p, n_TD, bank))
        y_TD = self.attention(p, n_TD, begin, past, always, own)
        given_TD = self.normed(p, "written", x_TD + y_TD if self.config.join.source == "stream" else y_TD)
        m_TD, bank = self.running(p, given_TD, bank)
        return x_TD + self.combined(p, y_TD, m_TD), bank

    def persistent(self, p: dict[str, Any]) -> Rows:
        return list(self.normed(p, "attention", p["persistent"]["start"])) if "persistent" in p else []

    def attention(
        self, p: dict[str, Any], n_TD: np.ndarray, begin: int, past: Past, always: Rows, own: np.ndarray | None = None
    ) -> np.ndarray:
        """Each token sees `always`, which stands at the segment's start, the window, and `own` up to itself."""
        a, window, out = p["attention"], self.config.decoder.window_tokens, []
        full = self.config.decoder.max_tokens is not None

        def keys_values(row_D: np.ndarray, place: int) -> tuple[np.ndarray, np.ndarray]:
            _, k_GK, v_GK = self.unrotated(a, row_D)
            return rotated(k_GK, place, self.frequencies), v_GK

        beside = [keys_values(row, 0 if full else begin) for row in always]
        retrieved = [] if own is None else [keys_values(row, begin + j) for j, row in enumerate(own)]
        for t, x_D in enumerate(n_TD):
            for kept, new in zip(past, keys_values(x_D, begin + t), strict=True):
                kept.append(new)
            first = begin if window is None else max(0, begin + t - window + 1)
            first = 0 if full else first
            seen = beside + retrieved[max(first - begin, 0) : t + 1] + list(zip(*past, strict=True))[first:]
            q_HK = rotated(self.unrotated(a, x_D)[0], begin + t, self.frequencies)
            keys, values = ([pair[i] for pair in seen] for i in (0, 1))
            out.append(with_bias(merged(attended(q_HK, keys, values), a["o_proj"]["w"]), a["o_proj"]))
        return np.array(out)

    def combined(self, p: dict[str, Any], y_TD: np.ndarray, m_TD: np.ndarray) -> np.ndarray:
        c = p["combine"]
        y_normed, m_normed = (
            rms_norm(x, c[f"norm_{name}"]["scale"]) for x, name in ((y_TD, "attention"), (m_TD, "memory"))
        )
        if self.config.join.combine.kind == "product":
            return y_normed * sigmoid(m_normed)
        logit = y_normed @ c["gate_attention"]["w"] + m_normed @ c["gate_memory"]["w"] + c["gate_bias"]["b"]
        return sigmoid(logit) * y_TD + (1 - sigmoid(logit)) * m_TD

    def rows(self, p: dict[str, Any], bank_ND: np.ndarray) -> np.ndarray:
        return rms_norm(bank_ND, p["memory"]["norm"]["scale"]) if self.config.memory.norm_slots else bank_ND

    def asked(self, p: dict[str, Any], x_TD: np.ndarray, bank_ND: np.ndarray) -> np.ndarray:
        """The bank's own read of each row."""
        keys, values = ([heads(row, p["memory"][name]["w"]) for row in self.rows(p, bank_ND)] for name in ("k", "v"))
        top_k = self.config.memory.top_k
        return np.array(
            [attended(heads(x, p["memory"]["q"]["w"]), keys, values, top_k).reshape(-1) for x in self.given(p, x_TD)]
        )

    def running(self, p: dict[str, Any], x_TD: np.ndarray, bank: Any) -> tuple[np.ndarray, Any]:
        """What each row is told, and the memory behind them: of a bank, as it stood before them."""
        return self.asked(p, x_TD, bank), self.written(p, x_TD, bank)

    def written(self, p: dict[str, Any], x_TD: np.ndarray, bank_ND: np.ndarray) -> np.ndarray:
        writes = {SlotsWrite: self.write_slots, PaperWrite: self.write_paper, ContentWrite: self.write_paper}
        write = writes[type(self.config.memory.write)]
        return write(p, x_TD, bank_ND, 0, Past([], []))
