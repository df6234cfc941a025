"""Products of the inner loop run at the highest precision, and what the accelerators' roundings do to the loop.

On a TPU a float32 product takes one, three or six passes over bfloat16 parts of its operands (default, high, highest).
Here the passes are emulated: `reduce_precision` makes the parts, and products of parts are exact up to their sum.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm2_jax.memory.titans import TitansConfig
from lm2_jax.ops.ttt_chunk import matmul
from lm2_jax.ops.ttt_chunk.chunk import ChunkInputs, FastWeights, Rates
from lm2_jax.ops.ttt_chunk.networks import NormWeights
from lm2_jax.ops.ttt_chunk.sharded import read_frozen, ttt_chunk
from lm2_jax.ops.ttt_chunk.step import empty_chunk, ttt_step
from lm2_jax.precision import Precision
from lm2_jax.training.flops import _inner
from tests.contract.subjects import FLOAT64
from tests.memory import driver

D, CONFIG = 32, TitansConfig(num_heads=2)
NATIVE = matmul.contract
TEXTS = ("words", "noise")


def parts(a: jax.Array, count: int) -> list[jax.Array]:
    """bfloat16 numbers whose sum is `a`, up to 2^(-8 count); the first has the derivative of `a`, the others 0."""
    made, rest = [], jax.lax.stop_gradient(a)
    for _ in range(count):
        made.append(jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest = rest - made[-1]
    return [a + jax.lax.stop_gradient(made[0] - a), *made[1:]]


def in_passes(count: int, a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """1 pass: one part of each operand; 3: two; 6: three, without products of the smaller parts."""
    each = {1: 1, 3: 2, 6: 3}[count]
    a_parts, b_parts = parts(a, each), parts(b, each)
    pairs = [(i, j) for i in range(each) for j in range(each - i)]
    assert len(pairs) == count
    return sum(NATIVE(a_parts[i], b_parts[j], a_axis, b_axis) for i, j in pairs)


@pytest.fixture
def set_passes(monkeypatch) -> Iterator[Callable[[int | None], None]]:
    """Chooses how `contract` multiplies; traces made before are dropped."""

    def set_to(count: int | None) -> None:
        monkeypatch.setattr(matmul, "contract", NATIVE if count is None else functools.partial(in_passes, count))
        jax.clear_caches()

    yield set_to
    set_to(None)


def text(name: str, T: int) -> np.ndarray:
    """`noise`: new tokens; `words`: 50 tokens, drawn again and again, so that keys repeat."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((50 if name == "words" else T, D))
    return (rows[np.random.default_rng(0).integers(0, 50, T)] if name == "words" else rows).astype(np.float32)[None]


def loop(x: np.ndarray, precision: Precision, *, grads: bool) -> dict[str, Any]:
    """Answers, state and gradient of the mean square answer, at the parameters that training starts from."""
    config = dataclasses.replace(CONFIG, remat="groups" if x.shape[1] > 1024 else "none")  # `none` compiles faster
    module, start = config.build(D, precision), config.build(D, Precision())
    with jax.enable_x64(False):
        first = jnp.asarray(x[:, :16])
        params = jax.jit(driver.init(start))(jax.random.key(0), first, start.init_state(1), jnp.ones((1, 16), bool))
    dtype = jnp.dtype(precision.compute)
    params = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), dtype), nn.unbox(params))
    tokens, valid = jnp.asarray(x, dtype), jnp.ones(x.shape[:2], bool)

    def total(params: Any) -> Any:
        y, after = module.apply(params, tokens, module.init_state(1), valid, method=driver.call)
        return jnp.mean(y**2), {"answers": y, "state": (after.weights, after.momentum)}

    if not grads:
        return jax.jit(lambda params: total(params)[1])(params)
    gradient, made = jax.jit(jax.grad(total, has_aux=True))(params)
    return made | {"gradient": gradient}


def exact(x: np.ndarray, *, grads: bool) -> dict[str, Any]:
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, loop(x, FLOAT64, grads=grads))


def error(got: Any, want: Any) -> float:
    """Norm of the difference, as a share of the norm."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    difference = sum(float(np.sum((np.asarray(a, np.float64) - b) ** 2)) for a, b in pairs)
    return (difference / sum(float(np.sum(b**2)) for _, b in pairs)) ** 0.5


def products(jaxpr: Any) -> Iterator[Any]:
    """All `dot_general` of a program and of the programs inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in _inner(equation.params):
            yield from products(inner)


def test_every_product_of_the_inner_loop_has_the_highest_precision():
    """Training, its derivative, frozen reads and streaming; a product that sets none is rounded on an accelerator."""
    spec, shapes = CONFIG.spec, CONFIG.network.shapes(16)
    B, T, H, K = 1, 32, 2, 16
    fast = FastWeights(*(tuple(jnp.ones((B, H, *shape)) for shape in shapes) for _ in range(2)))
    inputs = ChunkInputs(
        *(jnp.ones((B, T, H, K)),) * 3, Rates(*(jnp.full((B, T, H), -0.1),) * 3), jnp.ones((B, T), bool)
    )
    norm = NormWeights(jnp.ones((H, K)), jnp.zeros((H, K)))

    def train(fast: FastWeights, inputs: ChunkInputs) -> jax.Array:
        after, y, _ = ttt_chunk(spec, norm, None, fast, inputs, "groups")
        frozen = read_frozen(spec.network, norm, after.weights, inputs.q)
        return sum(jnp.sum(jnp.tanh(a)) for a in jax.tree.leaves((after, y, frozen)))

    def stream(fast: FastWeights, inputs: ChunkInputs) -> Any:
        partial = empty_chunk(fast, inputs.rates, spec.chunk_tokens)
        return ttt_step(spec, norm, None, jnp.arange(T)[None], inputs, fast, partial)

    for program, least in ((train, 10), (jax.grad(train), 30), (stream, 10)):
        found = list(products(jax.make_jaxpr(program)(fast, inputs).jaxpr))
        assert len(found) >= least
        assert {equation.params["precision"] for equation in found} == {(jax.lax.Precision.HIGHEST,) * 2}


BOUNDS = {1: 1e-2, 6: 2e-6}  # at 256 tokens


@pytest.mark.slow
def test_values_and_gradients_by_the_passes_of_a_product(set_passes):
    """Six passes are as good as float32. One pass is not: a hundredth of each bound is exceeded."""
    x = text("words", 256)
    want = exact(x, grads=True)
    for count, bound in BOUNDS.items():
        set_passes(count)
        got = loop(x, Precision(), grads=True)
        errors = {name: error(got[name], want[name]) for name in want}
        assert max(errors.values()) < bound, errors
        assert min(errors.values()) > bound / 100, errors


BOUNDS_64K = {"words": {"answers": 5e-3, "state": 0.1}, "noise": {"answers": 2e-4, "state": 3e-3}}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_64k_tokens_with_operands_in_six_passes(name, set_passes):
    """Bounded, and about as close to float64 as plain float32; if words repeat, errors grow with the length."""
    x = text(name, 65_536)
    want = exact(x, grads=False)
    set_passes(6)
    got = loop(x, Precision(), grads=False)
    for part, bound in BOUNDS_64K[name].items():
        assert error(got[part], want[part]) < bound
    assert max(float(np.abs(w).max()) for w in jax.tree.leaves(got["state"])) < 5


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_64k_tokens_stay_bounded_even_with_rounded_operands(name, set_passes):
    """One pass: the state differs from the float64 state, but is bounded."""
    set_passes(1)
    got = loop(text(name, 65_536), Precision(), grads=False)
    assert np.isfinite(got["answers"]).all()
    assert max(float(np.abs(w).max()) for w in jax.tree.leaves(got["state"])) < 5


def table() -> None:
    """Prints the table of docs/experiments.md: python -m tests.memory.test_titans_precision 1024 65536."""
    for T in map(int, sys.argv[1:]):
        for name in TEXTS:
            x = text(name, T)
            want = exact(x, grads=True)
            for count in (None, 6, 3, 1):
                matmul.contract = NATIVE if count is None else functools.partial(in_passes, count)
                jax.clear_caches()
                got = loop(x, Precision(), grads=True)
                matmul.contract = NATIVE
                largest = max(float(np.abs(w).max()) for w in jax.tree.leaves(got["state"]))
                errors = " | ".join(f"{error(got[part], want[part]):.1e}" for part in ("answers", "state", "gradient"))
                print(f"| {T:,} {name} | {count or 'float32'} | {errors} | {largest:.2g} |", flush=True)


if __name__ == "__main__":
    table()
