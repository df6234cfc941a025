"""ARMT and Infini-attention token by token in numpy, float64, from the papers' equations: logits and states to 1e-9."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from lm2_jax.memory.compressive import CompressiveConfig
from tests.contract.subjects import Subject, small
from tests.parity.reference import Past, Reference, attended, heads, merged, rms_norm, rotated, sigmoid, swiglu

EPSILON_ARMT, EPSILON_INFINI = 1e-5, 1e-6


class RowsReference(Reference):
    """The parts that both share."""

    def embedded(self, tokens: np.ndarray) -> np.ndarray:
        return self.params["embed"]["table"][tokens]

    def logits_of(self, x_TD: np.ndarray) -> list[np.ndarray]:
        epsilon = self.config.decoder.norm_epsilon
        return [self.head(rms_norm(x, self.params["final_norm"]["scale"], epsilon)) for x in x_TD]


class ArmtReference(RowsReference):
    """Equations 1-9 of arXiv:2407.04841, with the released code's eps and clipping."""

    def features(self, x_K: np.ndarray) -> np.ndarray:
        """r_i r_(i - j) for j = 1..nu, r = [max(x, 0), max(-x, 0)]."""
        r = [max(value, 0.0) for value in x_K] + [max(-value, 0.0) for value in x_K]
        return np.array([r[i] * r[i - j] for j in range(1, self.config.memory.num_rolls + 1) for i in range(len(r))])

    def run(self, tokens: np.ndarray) -> tuple[np.ndarray, list[Any]]:
        T, logits = self.config.segment_tokens, []
        memories = [None] * len(self.layers)
        for begin in range(0, len(tokens), T):
            x = np.concatenate([self.embedded(tokens[begin : begin + T]), self.params["carrier"]["start"]])
            for layer, p in enumerate(self.layers):
                if memories[layer] is not None:
                    x = np.array([row + self.answer(p["memory"], row, *memories[layer]) for row in x])
                x, _ = self.block(p, x, 0, Past([], []), None, None)
                memories[layer] = self.take(p["memory"], x[T:], memories[layer])
            logits += self.logits_of(x[:T])
        return np.array(logits), memories

    def normed(self, p: dict[str, Any], x_D: np.ndarray) -> np.ndarray:
        return rms_norm(x_D, p["norm"]["scale"]) if self.config.memory.norm else x_D

    def answer(self, p: dict[str, Any], x_D: np.ndarray, A_PD: np.ndarray, z_P: np.ndarray) -> np.ndarray:
        phi = self.features(self.normed(p, x_D) @ p["q"]["w"])
        return phi @ A_PD / (z_P @ phi + EPSILON_ARMT)

    def take(self, p: dict[str, Any], rows: np.ndarray, memory: Any) -> tuple[np.ndarray, np.ndarray]:
        A, z = (np.zeros((1, 1)), np.zeros(1)) if memory is None else memory
        added, grown = 0.0, 0.0
        for m_D in (self.normed(p, row) for row in rows):
            phi = self.features(m_D @ p["k"]["w"])
            old, gamma = np.zeros(len(m_D)), 1.0
            if memory is not None:
                total = z @ phi + EPSILON_ARMT
                old = phi @ A / total
                gamma = min(max(1 - total / (phi @ phi + EPSILON_ARMT), 0.0), 1.0)
            beta = sigmoid(m_D @ p["gate_rate"] + p["rate_bias"]["b"][0])
            added = added + beta * np.outer(phi, m_D @ p["v"]["w"] - old)
            grown = grown + (gamma if self.config.memory.correction else 1.0) * phi
        return A + added, z + grown


class InfiniReference(RowsReference):
    """Equations 3-6 of arXiv:2404.07143 with sums, where the model has means."""

    def run(self, tokens: np.ndarray) -> tuple[np.ndarray, list[Any]]:
        d, T, logits = self.config.decoder, self.config.segment_tokens, []
        K, G = d.head_dim, d.num_kv_heads
        memories = [(np.zeros((G, K, K)), np.zeros((G, K))) for _ in self.layers]
        for begin in range(0, len(tokens), T):
            x = self.embedded(tokens[begin : begin + T])
            for layer, p in enumerate(self.layers):
                x, memories[layer] = self.heads_block(p, x, *memories[layer], seen=begin)
            logits += self.logits_of(x)
        return np.array(logits), memories

    def answer(self, s_K: np.ndarray, M_KV: np.ndarray, z_K: np.ndarray, seen: int) -> np.ndarray:
        return s_K @ M_KV / (s_K @ z_K + EPSILON_INFINI * seen) if seen else np.zeros(len(M_KV))

    def heads_block(self, p: dict[str, Any], x_TD: np.ndarray, M: np.ndarray, z: np.ndarray, seen: int) -> Any:
        d, a, past, out = self.config.decoder, p["attention"], Past([], []), []
        new_M, new_z, share = M.copy(), z.copy(), d.num_heads // d.num_kv_heads
        for t, x_D in enumerate(x_TD):
            n_D = rms_norm(x_D, p["attention_norm"]["scale"], d.norm_epsilon)
            q_HK, k_GK, v_GK = (heads(n_D, a[name]["w"]) for name in ("q_proj", "k_proj", "v_proj"))
            past.k.append(rotated(k_GK, t, self.frequencies))
            past.v.append(v_GK)
            y_HK = attended(rotated(q_HK, t, self.frequencies), past.k, past.v)
            for h in range(d.num_heads):
                gate, g = sigmoid(p["gate_memory"]["b"][h]), h // share
                y_HK[h] = gate * self.answer(sigma(q_HK[h]), M[g], z[g], seen) + (1 - gate) * y_HK[h]
            for g in range(d.num_kv_heads):
                s_K, value = sigma(k_GK[g]), v_GK[g]
                if self.config.memory.update == "delta":
                    value = value - self.answer(s_K, M[g], z[g], seen)
                new_M[g] += np.outer(s_K, value)
                new_z[g] += s_K
            h_D = x_D + merged(y_HK, a["o_proj"]["w"])
            out.append(h_D + swiglu(rms_norm(h_D, p["mlp_norm"]["scale"], d.norm_epsilon), p["mlp"]))
        return np.array(out), (new_M, new_z)


def sigma(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"correction": False, "norm": False, "num_rolls": 2}, marks=pytest.mark.slow)]
)
def test_armt_equals_the_reference(changes):
    config = small("armt_tiny").config
    memory = dataclasses.replace(config.memory, **changes)
    case, row = Subject(dataclasses.replace(config, memory=memory)), 1
    logits, state = case.apply(case.tokens)
    expected, memories = ArmtReference(case.config, case.params).run(case.tokens[row])
    np.testing.assert_allclose(logits[row], expected, rtol=1e-9, atol=1e-9)
    for layer, (matrix, norm) in enumerate(memories):
        got = state.groups[0].memory
        np.testing.assert_allclose(got.matrix[layer, row], matrix, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(got.norm[layer, row], norm, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("update", ["delta", pytest.param("linear", marks=pytest.mark.slow)])
def test_infini_attention_equals_the_reference(update):
    config = dataclasses.replace(small("infini_tiny").config, memory=CompressiveConfig(update=update))
    case, row = Subject(config), 1
    logits, state = case.apply(case.tokens)
    expected, memories = InfiniReference(case.config, case.params).run(case.tokens[row])
    np.testing.assert_allclose(logits[row], expected, rtol=1e-9, atol=1e-9)
    for layer, (matrix, norm) in enumerate(memories):
        got = jax.tree.map(np.asarray, state.groups[0].memory)
        np.testing.assert_allclose(case.S * got.matrix[layer, row], matrix, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(case.S * got.norm[layer, row], norm, rtol=1e-9, atol=1e-9)
