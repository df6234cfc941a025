"""The matrix form of a chunk equals the token loop: values, states and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax.ops.ttt_chunk import chunk as chunked
from lm2_jax.ops.ttt_chunk.chunk import ChunkInputs, ChunkSpec, FastWeights, Network, Rates
from lm2_jax.ops.ttt_chunk.networks import LinearNetwork, MlpNetwork, NormWeights, SquaredError
from lm2_jax.ops.ttt_chunk.ref import linear, mlp, token_loop
from lm2_jax.ops.ttt_chunk.remat import SCANS, group_size
from lm2_jax.ops.ttt_chunk.sharded import ttt_chunk
from tests.contract.subjects import UNOPTIMIZED

B, T, H, K, E = 2, 18, 2, 4, 2  # 18 tokens: no multiple of a chunk of 4 or 16


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


NETWORKS = {"linear": (LinearNetwork(), linear), "mlp": (MlpNetwork(expansion=E), mlp)}


def example(name: str):
    """Everything the result depends on, as a dict of float64 arrays, and which tokens count."""
    rng = np.random.default_rng(0)
    network = NETWORKS[name][0]
    text = {n: rng.standard_normal((B, T, H, K)) for n in "qkv"}
    for n in "qk":
        text[n] /= np.linalg.norm(text[n], axis=-1, keepdims=True)
    gates = {"theta": rng.standard_normal((B, T, H)) - 2, "e": 2 * rng.standard_normal((B, T, H)) + 1}
    gates["a"] = rng.standard_normal((B, T, H)) + 2
    fast = [0.5 * rng.standard_normal((B, H, *shape)) for shape in network.shapes(K)]
    speed = [0.1 * rng.standard_normal(w.shape) for w in fast]
    slow = [1 + 0.1 * rng.standard_normal((H, K)), 0.1 * rng.standard_normal((H, K))] if network.has_norm else []
    valid = np.ones((B, T), bool)
    valid[0, 5:8] = valid[0, 16] = valid[1, 0] = valid[1, 15:] = False
    tree = {"text": text, "gates": gates, "fast": fast, "speed": speed, "slow": slow}
    return jax.tree.map(jnp.asarray, tree), jnp.asarray(valid)


def weighted(y, weights, momentum):
    """A number to which everything contributes; and everything."""
    parts = [y, *weights, *momentum]
    return sum(jnp.sum(jnp.sin(jnp.arange(a.size)).reshape(a.shape) * a) for a in parts), (y, weights, momentum)


def in_chunks(tree, valid, *, name, chunk, momentum, forget, held=(False, False, False)):
    """By the form under test."""
    network, gates = NETWORKS[name][0], tree["gates"]
    rates = Rates(
        jax.nn.sigmoid(gates["theta"]),
        jax.nn.log_sigmoid(gates["e"]) if momentum else None,
        jax.nn.log_sigmoid(gates["a"]) if forget else None,
    )
    norm = NormWeights(*tree["slow"]) if tree["slow"] else None
    fast = FastWeights(tuple(tree["fast"]), tuple(tree["speed"]) if momentum else None)
    spec = ChunkSpec(Network(network), SquaredError(), chunk, held)
    fast, y, _ = ttt_chunk(
        spec,
        norm,
        None,
        fast,
        ChunkInputs(*(tree["text"][n] for n in "qkv"), rates, valid),
        remat="groups" if chunk == 4 else "none",
    )
    return weighted(jnp.where(valid[:, :, None, None], y, 0), fast.weights, fast.momentum or [])


def one_by_one(tree, valid, chunk, momentum, forget, *, name):
    """By the loop; whether there are momentum and forgetting may be traced."""
    gates = {n: jax.nn.sigmoid(g) for n, g in tree["gates"].items()}
    gates |= {"e": jnp.where(momentum, gates["e"], 0), "a": jnp.where(forget, gates["a"], 1)}
    tokens = tree["text"] | gates | {"valid": jnp.broadcast_to(valid[:, :, None], (B, T, H))}
    speed = [jnp.where(momentum, s, 0) for s in tree["speed"]]
    loop = functools.partial(token_loop, NETWORKS[name][1])
    heads = jax.vmap(loop, in_axes=(0, 0, 0, 1, None), out_axes=(1, 0, 0))
    y, weights, speed = jax.vmap(heads, in_axes=(0, 0, None, 0, None))(tree["fast"], speed, tree["slow"], tokens, chunk)
    return weighted(jnp.where(valid[:, :, None, None], y, 0), weights, [jnp.where(momentum, s, 0) for s in speed])


@functools.cache
def reference(name):
    return jax.jit(jax.grad(functools.partial(one_by_one, name=name), has_aux=True), compiler_options=UNOPTIMIZED)


SLOW = {("mlp", 1, True, True), ("mlp", 16, True, True), ("mlp", 4, False, True), ("mlp", 4, True, False)}
CASES = [
    *[(name, chunk, True, True) for name in NETWORKS for chunk in (1, 4, 16)],
    *[(name, 4, *gates) for name in NETWORKS for gates in ((False, True), (True, False), (False, False))],
]


@pytest.mark.parametrize(
    ("name", "chunk", "momentum", "forget"),
    [pytest.param(*case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES],
)
def test_chunks_equal_the_token_loop(name, chunk, momentum, forget):
    """Answers, and weights and momentum after a text with padding; and the gradient by every input."""
    assert_equals_the_token_loop(name, chunk, momentum, forget)


def test_a_long_chunk_in_blocks_equals_the_token_loop(monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK_TOKENS", 4)
    assert_equals_the_token_loop("linear", 16, momentum=True, forget=True)


def assert_equals_the_token_loop(name, chunk, momentum, forget):
    tree, valid = example(name)
    form = functools.partial(in_chunks, name=name, chunk=chunk, momentum=momentum, forget=forget)
    grads, (y, weights, speed) = jax.jit(jax.grad(form, has_aux=True), compiler_options=UNOPTIMIZED)(tree, valid)
    want, (want_y, want_weights, want_speed) = reference(name)(tree, valid, chunk, momentum, forget)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    compare(y, want_y)
    jax.tree.map(compare, list(weights), list(want_weights))
    if momentum:
        jax.tree.map(compare, list(speed), list(want_speed))
    else:
        grads["speed"], want["speed"] = None, None
    jax.tree.map(compare, grads, want)


def test_rates_of_a_chunk_equal_the_token_loop():
    """Each token of the loop is given the rates of the first valid token of its chunk; so are their gradients."""
    (tree, valid), chunk = example("linear"), 4
    first_BT = np.zeros((B, T), int)
    for b, t in np.ndindex(B, T):
        members = range(t // chunk * chunk, min(t // chunk * chunk + chunk, T))
        first_BT[b, t] = next((i for i in members if valid[b, i]), members[0])

    def loop(tree):
        gates = {n: jnp.take_along_axis(g, first_BT[:, :, None], axis=1) for n, g in tree["gates"].items()}
        return one_by_one(tree | {"gates": gates}, valid, chunk, True, True, name="linear")

    def form(tree):
        return in_chunks(tree, valid, name="linear", chunk=chunk, momentum=True, forget=True, held=(True, True, True))

    got, want = (jax.jit(jax.grad(fn, has_aux=True), compiler_options=UNOPTIMIZED)(tree) for fn in (form, loop))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def one_head(k, v, q, chunk, log_momentum):
    """A linear memory of one head that starts at 0, steps of 1, gradient (k W - v) k, no forgetting."""
    k, v, q = (jnp.asarray(a, jnp.float64)[None, :, None] for a in (k, v, q))
    rates = Rates(jnp.ones((1, k.shape[1], 1)), log_momentum, None)
    zeros = (jnp.zeros((1, 1, 2, 2)),)
    fast = FastWeights(zeros, None if log_momentum is None else zeros)
    spec = ChunkSpec(Network(LinearNetwork()), SquaredError(factor=0.5), chunk, (False, False, False))
    return ttt_chunk(spec, None, None, fast, ChunkInputs(q, k, v, rates, jnp.ones((1, k.shape[1]), bool)), remat="none")


@pytest.mark.parametrize(("chunk", "momentum", "answer"), [(1, None, 4.0), (2, None, 6.0), (2, 0.5, 7.0)])
def test_two_values_under_one_key_by_hand(chunk, momentum, answer):
    """One by one the second replaces the first; from one start they add up; momentum repeats half the first."""
    log_momentum = None if momentum is None else jnp.full((1, 2, 1), np.log(momentum))
    keys, values, queries = ([[1, 0], [1, 0]], [[2, 0], [4, 0]], [[0, 1], [1, 0]])
    _, y, _ = jax.jit(lambda log: one_head(keys, values, queries, chunk, log))(log_momentum)
    np.testing.assert_allclose(y[0, 1, 0], [answer, 0])


def test_products_by_hand():
    log = jnp.log(jnp.asarray([0.5, 0.25, 0.125]))
    want = [[1, 0, 0], [0.25, 1, 0], [0.25 * 0.125, 0.125, 1]]
    np.testing.assert_allclose(chunked.decay_products(log), want, rtol=1e-12)


def test_products_are_exact_after_gates_near_zero():
    """In float32: entries after a closed gate keep all digits; nothing becomes NaN."""
    rng = np.random.default_rng(0)
    log = -rng.random(64) * 0.01
    log[3::16] = [-1e4, -800.0, -3e6, -90.0]
    products = jax.jit(chunked.decay_products, compiler_options=UNOPTIMIZED)
    got = np.asarray(products(jnp.asarray(log, jnp.float32)))
    want = np.exp(np.array([[log[s + 1 : t + 1].sum() if s <= t else -np.inf for s in range(64)] for t in range(64)]))
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-37)
    grad = jax.jit(jax.grad(lambda log: chunked.decay_products(log).sum()))(jnp.asarray(log, jnp.float32))
    assert np.isfinite(grad).all()


def test_padding_moves_nothing():
    """With momentum too: weights and momentum after a chunk of padding are bit-equal."""
    rng = np.random.default_rng(0)
    fast = FastWeights(*((jnp.asarray(rng.standard_normal((3, 5)), jnp.float32),) for _ in range(2)))
    log = jnp.full(4, -0.5, jnp.float32)
    rates = Rates(jnp.full(4, 0.1, jnp.float32), log, log)
    rows = chunked.TokenGradients(*((jnp.asarray(rng.standard_normal((4, n)), jnp.float32),) for n in (3, 5)))
    none, last = jnp.zeros(4, bool), jnp.arange(4) == 3

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def advance(valid_C):
        return chunked.update(Network(LinearNetwork()), fast, rows, *chunked.decay_coefficients(rates, valid_C))

    after = advance(none)
    jax.tree.map(np.testing.assert_array_equal, after, fast)
    moved = advance(last)
    (w,), (s,) = jax.tree.map(np.asarray, fast)
    step = -0.1 * np.outer(rows.inputs[0][3], rows.outputs[0][3]) + np.exp(-0.5) * s
    np.testing.assert_allclose(moved.momentum[0], step, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved.weights[0], np.exp(-0.5) * w + step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("steps", "group"), [(1, 1), (2, 1), (7, 2), (16, 4), (32, 8), (36, 6), (1024, 32)])
def test_groups_are_about_the_root(steps, group):
    assert group_size(steps) == group


def test_every_scan_is_a_scan():
    def step(carry, x):
        return carry * x, carry + x

    xs = jnp.linspace(0.5, 1.5, 12)
    assert_same = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-12))
    want = jax.value_and_grad(lambda x: jax.lax.scan(step, 1.0, x)[1].sum())(xs)
    for scan in SCANS.values():
        assert_same(jax.value_and_grad(lambda x, scan=scan: scan(step, 1.0, x, 4)[1].sum())(xs), want)
