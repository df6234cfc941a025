"""The joins with a Titans memory: projections in numpy, weights token by token (`lm2_jax.ops.ttt_chunk.ref`)."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from lm2_jax.memory.titans import TitansConfig
from lm2_jax.ops.ttt_chunk.networks import MlpNetwork
from lm2_jax.ops.ttt_chunk.ref import mlp, token_loop
from tests.parity.joins_reference import JoinsReference
from tests.parity.reference import Past, merged, rms_norm, sigmoid

STREAMS = ("q", "k", "v")


class Neural(NamedTuple):
    """The memory of one row, of one layer."""

    weights: list[np.ndarray]  # [H I O] each
    momentum: list[np.ndarray]
    tails: list[np.ndarray]  # the last inputs of the convolutions of q, k and v, [W H K]


class TitansReference(JoinsReference):
    """`JoinsReference` with a Titans memory in each block."""

    @functools.cached_property
    def memory(self) -> TitansConfig:
        """The memory's config; this reference has no other options."""
        c = self.config.memory
        network = MlpNetwork(expansion=c.network.expansion)
        assert c == TitansConfig(c.num_heads, c.chunk_tokens, network, forget=c.forget)
        return c

    def fresh(self, p: dict[str, Any]) -> Neural:
        """Learned weights, no momentum, and nothing before the text."""
        weights = [p["memory"][f"start_{i}"] for i in range(2)]
        return Neural(weights, [0 * w for w in weights], [self.nothing()] * 3)

    def nothing(self) -> np.ndarray:
        c = self.memory
        return np.zeros((c.conv_tokens - 1, c.num_heads, self.config.decoder.width // c.num_heads))

    def stream(self, p: dict[str, Any], name: str, x_TD: np.ndarray, tail: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Section 4.4: projection, causal convolution, SiLU, and length 1 for queries and keys; with the next tail."""
        w, W, T = p["memory"][name], len(tail), len(x_TD)
        inputs = np.concatenate([tail, np.tensordot(x_TD, w["w"]["w"], axes=1)])
        y_THK = np.array([sum(w["conv"]["w"][j] * inputs[W + t - j] for j in range(W + 1)) for t in range(T)])
        y_THK = y_THK * sigmoid(y_THK)
        if name != "v":
            y_THK = y_THK / np.sqrt((y_THK**2).sum(axis=-1, keepdims=True) + 1e-6)
        return y_THK, inputs[T:]

    def answer(self, p: dict[str, Any], y_THK: np.ndarray, x_TD: np.ndarray) -> np.ndarray:
        """Section 4.4: the read-out, normalised, gated, and projected."""
        m = p["memory"]
        gate_THK = sigmoid(np.tensordot(x_TD, m["gate_output"]["w"], axes=1))
        return merged(rms_norm(y_THK, m["norm"]["scale"]) * gate_THK, m["o"]["w"])

    def slow(self, p: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        return p["memory"]["inner_norm"]["scale"], p["memory"]["inner_norm"]["b"]

    def asked(self, p: dict[str, Any], x_TD: np.ndarray, memory: Neural) -> np.ndarray:
        """M*(q): all tokens read the same weights; the convolution starts from zeros."""
        q_THK, _ = self.stream(p, "q", x_TD, self.nothing())
        return self.answer(p, in_float64(_asked, memory.weights, q_THK, self.slow(p)), x_TD)

    def running(self, p: dict[str, Any], x_TD: np.ndarray, memory: Neural) -> tuple[np.ndarray, Neural]:
        """Equations 11-16: each token reads the weights after itself."""
        m, shape = p["memory"], (len(x_TD), self.memory.num_heads)

        def gate(name: str) -> np.ndarray:
            return sigmoid(x_TD @ m[f"gate_{name}"]["w"]["w"] + m[f"gate_{name}"]["b"]["b"])

        made = [self.stream(p, name, x_TD, tail) for name, tail in zip(STREAMS, memory.tails, strict=True)]
        tokens = {name: y_THK for name, (y_THK, _) in zip(STREAMS, made, strict=True)}
        tokens |= {"theta": self.memory.step.maximum * gate("step"), "e": gate("momentum")}
        tokens |= {"a": np.ones(shape) if self.memory.forget.per == "off" else 1 - gate("forget")}
        tokens |= {"valid": np.ones(shape, bool)}
        loop = (memory.weights, memory.momentum, self.slow(p), tokens, self.memory.chunk_tokens)
        y_THK, weights, momentum = in_float64(_run, *loop)
        return self.answer(p, y_THK, x_TD), Neural(weights, momentum, [tail for _, tail in made])

    def written(self, p: dict[str, Any], x_TD: np.ndarray, memory: Neural) -> Neural:
        return self.running(p, x_TD, memory)[1]

    def residual(self, p: dict[str, Any], x_TD: np.ndarray, begin: int, past: Past, memory: Neural) -> Any:
        """LM2's join, which queries with attention's output and writes it."""
        y_TD = self.attention(p, self.normed(p, "attention", x_TD), begin, past, [])
        m_TD = self.asked(p, y_TD, memory)
        gate = p["gate_output"]
        return x_TD + y_TD + sigmoid(m_TD @ gate["w"]["w"] + gate["b"]["b"]) * m_TD, self.written(p, y_TD, memory)


def in_float64(fn: Any, *args: Any) -> Any:
    """`fn` in jax, with arrays of numpy around it."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        return jax.tree.map(np.asarray, fn(*args))


@jax.jit
def _asked(weights: Any, q_THK: Any, slow: Any) -> Any:
    of_tokens = jax.vmap(mlp, in_axes=(None, 0, None))
    return jax.vmap(of_tokens, in_axes=(0, 1, 0), out_axes=1)(weights, q_THK, slow)


@jax.jit
def _run(weights: Any, momentum: Any, slow: Any, tokens: Any, chunk_tokens: Any) -> Any:
    heads = jax.vmap(functools.partial(token_loop, mlp), in_axes=(0, 0, 0, 1, None), out_axes=(1, 0, 0))
    return heads(weights, momentum, slow, tokens, chunk_tokens)
