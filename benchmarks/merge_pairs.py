"""Merged memories as associative memories: key-value pairs without a trained model.

    python -m benchmarks.merge_pairs

Two texts of random unit keys with random unit values are written into memories of one head of width 16, with the code
and the merge of `lm2_jax.memory`. A text repeats its pairs in random order up to its length. Then every key asks; an
answer is right if the value of its pair is the one with the largest inner product among the values of both texts. This
measures the update rules alone: how much of each text is in memory A, memory B, the merged memory, and a memory that
read A and then B.

- delta rule: rate 0.5, decay 0.99 at each token;
- Titans: MLP of depth 2, chunks of 16 tokens, step 0.02, momentum 0.88, forgetting 0.0025 at each token (momentum and
  forgetting are the initial values of `TitansConfig`); "momentum 0": the merged momentum is dropped.

Keys ask directly after the texts, and again after 32 tokens of other pairs, in which the momentum takes effect.

Writes benchmarks/results/merge_pairs.json and .md. The same command resumes: lengths in the .json are not measured
again.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import origin
from lm2_jax import cli
from lm2_jax.memory.gated_delta import Delta, GatedDelta, GatedDeltaConfig, recurrent
from lm2_jax.memory.titans import Titans, TitansConfig
from lm2_jax.ops.ttt_chunk.chunk import ChunkInputs, FastWeights, Rates
from lm2_jax.ops.ttt_chunk.networks import NormWeights
from lm2_jax.ops.ttt_chunk.sharded import read_frozen, ttt_chunk
from lm2_jax.precision import Precision

WIDTH, PIECE, LATER = 16, 32, 32
DELTA_RATE, DELTA_DECAY = 0.5, 0.99
STEP, MOMENTUM, FORGET = 0.02, 0.88, 0.0025
TITANS = TitansConfig(num_heads=1, conv_tokens=0)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Command:
    """Options."""

    pairs: int = 6
    """Pairs of each text."""
    tokens: tuple[int, ...] = (32, 128, 512)
    """Lengths of each text; multiples of 32."""
    trials: int = 64
    """Pairs of texts."""
    seed: int = 0
    """Seed of all draws."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/merge_pairs")
    """Table to write, as .json and .md."""


class DeltaRule:
    """The gated delta rule's matrix; zero at the start."""

    name = "delta rule"

    def __init__(self, rng: np.random.Generator, trials: int):
        module = GatedDelta(GatedDeltaConfig(num_heads=1, conv_tokens=0), WIDTH, Precision())
        self.start = module.init_state(trials)
        self._merge = _merge_of(module, module.init_state(1))

    def read(self, state: Any, k_BTK: np.ndarray, v_BTK: np.ndarray) -> Any:
        """The state after tokens."""
        return state._replace(matrix=_delta_piece(state.matrix, k_BTK, v_BTK))

    def merged(self, states: list[Any]) -> dict[str, Any]:
        """Merged states by name."""
        return {"merged": self._merge(states)}

    def answers(self, state: Any, q_BNK: np.ndarray) -> np.ndarray:
        """What is found for keys."""
        return np.einsum("bnk,bkv->bnv", q_BNK, np.asarray(state.matrix)[:, 0])


class TitansMemory:
    """Titans' fast weights, with random start weights."""

    name = "Titans"

    def __init__(self, rng: np.random.Generator, trials: int):
        module = Titans(TITANS, WIDTH, Precision())
        one = module.init_state(1)
        weights = tuple(jnp.asarray(rng.standard_normal(w.shape) * w.shape[-2] ** -0.5, w.dtype) for w in one.weights)
        one = one._replace(weights=weights)
        self.start = jax.tree.map(lambda leaf: jnp.repeat(leaf, trials, axis=0), one)
        self._merge = _merge_of(module, one)

    def read(self, state: Any, k_BTK: np.ndarray, v_BTK: np.ndarray) -> Any:
        """The state after tokens."""
        weights, momentum = _titans_piece(FastWeights(state.weights, state.momentum), k_BTK, v_BTK)
        return state._replace(weights=weights, momentum=momentum)

    def merged(self, states: list[Any]) -> dict[str, Any]:
        """Merged states by name."""
        state = self._merge(states)
        still = state._replace(momentum=jax.tree.map(jnp.zeros_like, state.momentum))
        return {"merged": state, "merged, momentum 0": still}

    def answers(self, state: Any, q_BNK: np.ndarray) -> np.ndarray:
        """What is found for keys."""
        return np.asarray(_titans_answers(state.weights, jnp.asarray(q_BNK[:, :, None])))[:, :, 0]


def _merge_of(module: Any, start: Any) -> Any:
    return lambda states: module.init_with_output(jax.random.key(0), states, start, method="merged")[0]


@jax.jit
def _delta_piece(matrix: Any, k_BTK: Any, v_BTK: Any) -> Any:
    rate = jnp.full((*k_BTK.shape[:2], 1), DELTA_RATE, jnp.float32)
    k, v = k_BTK[:, :, None], v_BTK[:, :, None]
    tokens = Delta(k, k, v, jnp.full_like(rate, math.log(DELTA_DECAY)), rate, jnp.zeros(rate.shape[:2], bool))
    return recurrent(tokens, matrix)[1]


def _norm() -> NormWeights | None:
    if not TITANS.network.has_norm:
        return None
    return NormWeights(jnp.ones((1, WIDTH)), jnp.zeros((1, WIDTH)))


@jax.jit
def _titans_piece(fast: FastWeights, k_BTK: Any, v_BTK: Any) -> FastWeights:
    def full(value: float) -> Any:
        return jnp.full((*k_BTK.shape[:2], 1), value, jnp.float32)

    rates = Rates(full(STEP), full(math.log(MOMENTUM)), full(math.log1p(-FORGET)))
    inputs = ChunkInputs(None, k_BTK[:, :, None], v_BTK[:, :, None], rates, jnp.ones(k_BTK.shape[:2], bool))
    return ttt_chunk(TITANS.spec, _norm(), None, fast, inputs, "none")[0]


@jax.jit
def _titans_answers(weights: Any, q_BNHK: Any) -> Any:
    return read_frozen(TITANS.spec.network, _norm(), weights, q_BNHK)


def units(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random vectors of length 1."""
    x = rng.standard_normal((*shape, WIDTH)).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def read_pairs(
    memory: Any, state: Any, keys_BNK: np.ndarray, values_BNK: np.ndarray, tokens: int, rng: np.random.Generator
) -> Any:
    """Reads the pairs again and again, each time in another order."""
    trials, pairs = keys_BNK.shape[:2]
    rounds = -(-tokens // pairs)
    order_BT = np.stack([np.concatenate([rng.permutation(pairs) for _ in range(rounds)]) for _ in range(trials)])
    for first in range(0, tokens, PIECE):
        at_BT1 = order_BT[:, first : min(first + PIECE, tokens), None]
        k_BTK, v_BTK = (np.take_along_axis(a, at_BT1, axis=1) for a in (keys_BNK, values_BNK))
        state = memory.read(state, k_BTK, v_BTK)
    return state


def measure(kind: type, tokens: int, command: Command) -> list[Row]:
    """All states of one memory at one length."""
    rng = np.random.default_rng(command.seed)
    memory = kind(rng, command.trials)
    shape = (command.trials, command.pairs)
    (ka, va), (kb, vb), (kc, vc) = ((units(rng, *shape), units(rng, *shape)) for _ in range(3))
    a, b = (read_pairs(memory, memory.start, k, v, tokens, rng) for k, v in ((ka, va), (kb, vb)))
    in_a_row = read_pairs(memory, a, kb, vb, tokens, rng)
    states = {"memory A": a, "memory B": b, **memory.merged([a, b]), "A then B in a row": in_a_row}
    states["nothing"] = memory.start
    values_BMK, rows = np.concatenate([va, vb], axis=1), []
    for later in (0, LATER):
        for name, state in states.items():
            state = read_pairs(memory, state, kc, vc, later, np.random.default_rng(1)) if later else state
            shares = []
            for number, keys in enumerate((ka, kb)):
                scores_BNM = np.einsum("bnv,bmv->bnm", memory.answers(state, keys), values_BMK)
                right_BN = scores_BNM.argmax(axis=-1) == number * command.pairs + np.arange(command.pairs)
                shares.append(right_BN.mean(axis=1).tolist())
            rows.append({"memory": memory.name, "tokens": tokens, "later": later, "state": name, "right": shares})
    return rows


def shown(shares: list[float]) -> str:
    """Mean in per cent with its 95% interval over trials."""
    half = 1.959964 * np.std(shares, ddof=1) / math.sqrt(len(shares))
    return f"{100 * np.mean(shares):.1f} +- {100 * half:.1f}"


def write(held: dict[str, Any], out: pathlib.Path) -> None:
    """Writes the .json and the table."""
    names = ("memory", "tokens of each text", "tokens read afterwards", "state", "pairs of A", "pairs of B")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in held["results"]:
        cells = " | ".join(map(shown, row["right"]))
        lines.append(f"| {row['memory']} | {row['tokens']} | {row['later']} | {row['state']} | {cells} |")
    text = (
        "# Key-value pairs in merged memories\n\nNo trained model: the update rules alone "
        f"(benchmarks/merge_pairs.py). Right answers in per cent with 95% intervals over {held['trials']} trials of "
        f"{held['pairs']} pairs per text; a guess among all values is right in {50 / held['pairs']:.1f}%. "
        "The delta rule finds zeros for 'nothing', for which the first value counts as chosen.\n\n"
    )
    table = "\n".join(lines)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(f"{text}{table}\n\n{origin.markdown([(held['command'], held['machine'])])}")
    out.with_suffix(".json").write_text(json.dumps(held, indent=1) + "\n")


def main() -> None:
    """Measures what is missing and writes the table."""
    command = tyro.cli(Command, description=__doc__)
    settings = {"pairs": command.pairs, "trials": command.trials, "seed": command.seed}
    file = command.out.with_suffix(".json")
    held: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if any(held.get(name) != value for name, value in settings.items()):
        held = {**settings, "results": []}
    held |= {"command": origin.typed("benchmarks.merge_pairs"), "machine": origin.cores()}
    for kind in (DeltaRule, TitansMemory):
        for tokens in command.tokens:
            if any(row["memory"] == kind.name and row["tokens"] == tokens for row in held["results"]):
                continue
            held["results"] += measure(kind, tokens, command)
            write(held, command.out)
    write(held, command.out)
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    cli.run(main)
