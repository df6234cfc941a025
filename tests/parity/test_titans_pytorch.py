"""titans-pytorch's NeuralMemory on random weights; golden/README.md says how it was run, docs/parity.md what agrees.

Its memory and ours are one function where a chunk is one token, as the paper's equations have it. In longer chunks its
momentum and forgetting act once per chunk, and its tokens read the weights before their chunk.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax.memory.titans import GateConfig, StepConfig, TitansConfig
from lm2_jax.ops.ttt_chunk.networks import MlpNetwork, SquaredError
from lm2_jax.precision import Precision
from tests.memory import driver

HEADS, K, MAX_STEP = 2, 4, 0.2
D = HEADS * K
PLAIN = {"norm": False, "residual": False}


def config(network, chunk_tokens=1, **changes):
    """Ours as theirs is: the mean of squares, no convolutions, no SiLU, no unit keys, no norm of what was found."""
    fields = {
        "num_heads": HEADS,
        "chunk_tokens": chunk_tokens,
        "network": network,
        "loss": SquaredError(factor=1 / K),
        "step": StepConfig(maximum=MAX_STEP),
        "momentum": GateConfig(),
        "forget": GateConfig(),
        "conv_tokens": 0,
        "silu": False,
        "unit_keys": False,
        "output_norm": False,
    }
    return TitansConfig(**(fields | changes))


class Case:
    """One memory that was run: its arrays, and our parameters with its weights."""

    def __init__(self, name):
        with np.load(Path(__file__).parent / "golden" / "titans_pytorch.npz") as arrays:
            start = f"{name}/"
            self.arrays = {key.removeprefix(start): arrays[key] for key in arrays.files if key.startswith(start)}
        x = self.arrays["x"].astype(np.float64)
        self.x = jnp.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + np.finfo(np.float32).eps), jnp.float32)
        self.y = self.arrays["y"]
        self.matrices = sorted(int(key[6:]) for key in self.arrays if key.startswith("after/"))
        if self.arrays["after/0"].ndim == 3:  # the scale of its inner norm comes first
            self.matrices = self.matrices[1:]
        self.after = [self.arrays[f"after/{i}"] for i in self.matrices]

    def params(self):
        """Theirs are [out in], and their two norms have scales, which become part of the projections after them."""
        w = {key.removeprefix("weights/"): a for key, a in self.arrays.items() if key.startswith("weights/")}
        stored, asked = w["store_norm.weight"][:, None], w["retrieve_norm.weight"][:, None]

        def per_head(matrix):
            return matrix.reshape(D, HEADS, K)

        def gate(name):
            return {"w": {"w": stored * w[f"{name}.0.weight"].T}, "b": {"b": w[f"{name}.0.bias"]}}

        found = {
            "q": {"w": {"w": per_head(asked * w["to_queries.weight"].T)}},
            "k": {"w": {"w": per_head(stored * w["to_keys.weight"].T)}},
            "v": {"w": {"w": per_head(stored * w["to_values.weight"].T)}},
            "gate_step": gate("to_adaptive_step"),
            "gate_forget": gate("to_decay_factor"),
            "gate_output": {"w": np.repeat((asked * w["retrieve_gate.0.weight"].T)[:, :, None], K, axis=2)},
            "o": {"w": w["combine_heads.weight"].T.reshape(HEADS, K, D)},
            "inner_norm": {"scale": np.ones((HEADS, K)), "b": np.zeros((HEADS, K))},
            **{f"start_{i}": w[f"memory_model_parameters.{at}"] for i, at in enumerate(self.matrices)},
        }
        if "to_momentum.0.weight" in w:
            found["gate_momentum"] = gate("to_momentum")
        return found

    def module(self, config):
        """Ours and its parameters: exactly the weights that the config has."""
        module = config.build(D, Precision())
        state, valid = module.init_state(2), jnp.ones(self.x.shape[:2], bool)
        shapes = jax.eval_shape(driver.init(module), jax.random.key(0), self.x, state, valid)["params"]
        ours = self.params()

        def fill(path, leaf):
            found = ours
            for key in jax.tree_util.keystr(path, simple=True, separator="/").split("/"):
                found = found if key == "value" else found[key]
            return jnp.asarray(found, jnp.float32).reshape(leaf.shape)

        return module, {"params": jax.tree_util.tree_map_with_path(fill, shapes)}

    def run(self, config):
        """Our answers, and the memory after the text."""
        module, params = self.module(config)
        state, valid = module.init_state(2), jnp.ones(self.x.shape[:2], bool)
        call = jax.jit(lambda params, x: module.apply(params, x, state, valid, method=driver.call))
        with jax.default_matmul_precision("highest"):
            return call(params, self.x)


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def difference(got, wanted):
    """The largest difference, relative to the largest value."""
    return float(np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max())


CHUNKS_OF_ONE = {
    "linear": MlpNetwork(depth=1, **PLAIN),
    "linear_norm": MlpNetwork(depth=1, norm_epsilon=1e-5),
    "mlp_tanh": MlpNetwork(depth=2, expansion=2, **PLAIN),
}


@pytest.mark.parametrize("name", CHUNKS_OF_ONE)
def test_chunks_of_one_token(name):
    """Answers, weights and momentum: gates, loss, norm and residual, gating of heads, and the time of a read."""
    case = Case(name)
    y, state = case.run(config(CHUNKS_OF_ONE[name]))
    close(y, case.y)
    for ours, theirs in zip(state.weights, case.after, strict=True):
        close(ours, theirs)
    for ours, index in zip(state.momentum, case.matrices, strict=True):
        close(ours, case.arrays[f"momentum/{index}"])
    start = [case.params()[f"start_{i}"] for i in range(len(case.after))]
    assert min(difference(s[None], w) for s, w in zip(start, case.after, strict=True)) > 0.1, "it learned"


def test_chunks_of_four_tokens_without_momentum_and_forgetting():
    """The same weights after each chunk; a token reads the weights before its chunk, but the last one those after."""
    case = Case("chunks")
    off = GateConfig("off")
    linear = config(MlpNetwork(depth=1, **PLAIN), 4, momentum=off, forget=off)
    y, state = case.run(linear)
    close(state.weights[0], case.after[0])
    close(y[:, 3::4], case.y[:, 3::4])
    assert difference(y[:, :3], case.y[:, :3]) > 0.01, "ours reads the weights after each token"
    module, params = case.module(linear)
    state, read = module.init_state(2), []
    for first in range(0, 12, 4):
        x, valid = case.x[:, first : first + 4], jnp.ones((2, 4), bool)
        read.append(module.apply(params, x, state, method=driver.read)[:, :3])
        _, state = module.apply(params, x, state, valid, method=driver.call)
    close(np.concatenate(read, axis=1), case.y.reshape(2, 3, 4, D)[:, :, :3].reshape(2, 9, D))


# What differs by definition, and by how much on these weights: the table of docs/parity.md.
DIFFERENT = {
    "mlp_erf": (config(MlpNetwork(depth=2, expansion=2, **PLAIN)), 1e-4, 1e-3),
    "default_norm": (config(MlpNetwork(depth=2, expansion=2, norm_epsilon=1e-5)), 0.1, np.inf),
    "chunks_gates": (config(MlpNetwork(depth=1, **PLAIN), 4), 0.1, np.inf),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_by_definition(name):
    ours, least, most = DIFFERENT[name]
    case = Case(name)
    assert least < difference(case.run(ours)[0], case.y) < most
