"""The Titans memory as a module: against its equations, in pieces, over borders, through padding."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm2_jax.blocks.gate import GateJoin
from lm2_jax.config import ModelConfig
from lm2_jax.memory.projections import ConvProjection
from lm2_jax.memory.titans import GateConfig, StepConfig, TitansConfig, TitansState
from lm2_jax.ops.ttt_chunk.networks import LinearNetwork, MlpNetwork
from lm2_jax.ops.ttt_chunk.ref import mlp, token_loop
from lm2_jax.parameters import describe
from lm2_jax.precision import Precision
from lm2_jax.state import reset_rows
from tests.contract.subjects import FLOAT64, UNOPTIMIZED
from tests.memory import driver

B, T, H, K, C = 2, 12, 2, 4, 4
D = H * K
MLP = MlpNetwork(expansion=2)

VARIANTS = {
    "default": TitansConfig(H, C, network=MLP),
    # options that are off in `default`: rates per chunk, biases, steps by position, no convolution
    "chunk": TitansConfig(
        H,
        C,
        network=MlpNetwork(depth=1, bias=True),
        step=StepConfig("chunk", by_place=True),
        momentum=GateConfig("chunk", 1.0),
        forget=GateConfig("chunk", -2.0),
        conv_tokens=0,
    ),
    "plain": TitansConfig(
        H,
        C,
        network=LinearNetwork(),
        step=StepConfig("fixed", 0.5),
        momentum=GateConfig("off"),
        forget=GateConfig("off"),
        conv_tokens=1,
        output_norm=False,
        output_gate="none",
    ),
}


class Case:
    """One memory in float64 at generic parameters, its programs compiled once."""

    def __init__(self, config: TitansConfig):
        self.config, self.memory = config, config.build(D, FLOAT64)
        rng = np.random.default_rng(0)
        with jax.enable_x64(True):
            self.state = self.memory.init_state(B)
            self.x = jnp.asarray(rng.standard_normal((B, T, D)))
            self.valid = jnp.ones((B, T), bool)
            shapes = jax.eval_shape(driver.init(self.memory), jax.random.key(0), self.x, self.state, self.valid)

            def draw(path, leaf):
                noise = rng.standard_normal(leaf.shape)
                value = {"scale": 1 + 0.1 * noise, "b": 0.3 * noise}.get(path[-1].key, noise * 0.5)
                return jnp.asarray(value, leaf.dtype)

            self.params = jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes))

    def program(self, method: Any) -> Any:
        """A function of `driver` without the module and its parameters, compiled."""
        call = functools.partial(self.memory.apply, method=method)
        return functools.partial(jax.jit(call, compiler_options=UNOPTIMIZED), self.params)

    @functools.cached_property
    def call(self):
        return self.program(driver.call)

    @functools.cached_property
    def read(self):
        return self.program(driver.read)

    @functools.cached_property
    def open(self):
        return self.program(driver.opened)

    @functools.cached_property
    def _extend(self):
        return self.program(driver.extend)

    def extend(self, x, position, at):
        return self._extend(x, position, T, at)

    @functools.cached_property
    def _ask(self):
        return self.program(driver.ask)

    def ask(self, x, position, at):
        return self._ask(x, position, T, at)

    @functools.cached_property
    def close(self):
        return self.program(driver.close)


@functools.cache
def variant(name: str) -> Case:
    return Case(VARIANTS[name])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=VARIANTS, scope="module")
def case(request) -> Case:
    return variant(request.param)


def assert_close(got: Any, want: Any, tolerance: float = 1e-9) -> None:
    def compare(a, b):
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=tolerance, atol=tolerance)

    jax.tree.map(compare, got, want)


def assert_equal(got: Any, want: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_state_holds_no_empty_arrays(case):
    """A checkpoint could not hold them; a convolution of one token needs no inputs of tokens before it."""
    assert all(leaf.size for leaf in jax.tree.leaves(case.state))
    assert (case.state.tails is None) == (case.config.conv_tokens < 2)


def test_a_convolution_of_one_token_scales_its_input():
    """Doubled kernels double q, k and v if there is no activation and no norm."""
    config = dataclasses.replace(VARIANTS["plain"], silu=False, unit_keys=False)
    stream = ConvProjection(D, H, FLOAT64, config.conv_tokens, config.silu, config.unit_keys)
    x, valid = variant("plain").x, variant("plain").valid
    params = stream.init(jax.random.key(0), x, None, valid, jnp.dtype("float64"))
    twice = nn.unbox(params)
    twice["params"]["conv"]["w"] = 2 * twice["params"]["conv"]["w"]
    y, z = (stream.apply(p, x, None, valid, jnp.dtype("float64")) for p in (nn.unbox(params), twice))
    assert_close(2 * y, z)


def without_remat(case: Case) -> Any:
    """The memory as it is quicker to differentiate; `test_chunk_form` has gradients through groups of chunks."""
    return dataclasses.replace(case.config, remat="none").build(D, FLOAT64)


def used(case: Case) -> TitansState:
    """A state that a text has been through."""
    return case.call(case.x[:, ::-1], case.state, case.valid)[1]


def stream(x_TD, w, conv, is_unit):
    """A projection, four taps of a convolution from zero, SiLU, and a norm, of one row and one head."""
    y = x_TD @ w
    y = sum(jnp.concatenate([jnp.zeros((j, K)), y[: T - j]]) * conv[j] for j in range(4))
    y = y * jax.nn.sigmoid(y)
    return y / jnp.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) if is_unit else y


def by_equations(params, x_BTD, case: Case):
    """Section 3 and 4.4 of the paper, row by row, head by head, token by token."""
    p, c = params["params"], case.config
    rows, states = [], []
    for x_TD in x_BTD:
        heads, fasts = [], []
        for h in range(H):
            q, k, v = (stream(x_TD, p[n]["w"]["w"][:, h], p[n]["conv"]["w"][:, h], n != "v") for n in "qkv")
            gate = {n: x_TD @ p[f"gate_{n}"]["w"]["w"][:, h] + p[f"gate_{n}"]["b"]["b"][h] for n in GATES}
            gate = {n: 1 / (1 + jnp.exp(-logit)) for n, logit in gate.items()}
            tokens = {"q": q, "k": k, "v": v, "theta": c.step.maximum * gate["step"], "e": gate["momentum"]}
            tokens |= {"a": 1 - gate["forget"], "valid": jnp.ones(T, bool)}
            slow = (p["inner_norm"]["scale"][h], p["inner_norm"]["b"][h])
            start = [p["start_0"][h], p["start_1"][h]]
            y, weights, speed = token_loop(mlp, start, [0 * w for w in start], slow, tokens, C)
            y = y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * p["norm"]["scale"]
            y = y / (1 + jnp.exp(-x_TD @ p["gate_output"]["w"][:, h]))
            heads.append(y @ p["o"]["w"][h])
            fasts.append((weights, speed))
        rows.append(sum(heads))
        states.append(fasts)
    return jnp.stack(rows), states


GATES = ("step", "momentum", "forget")


def test_the_module_is_its_equations():
    """Answers, weights, momentum, and the gradient of every parameter and of the text."""
    case = variant("default")
    memory = without_remat(case)

    def weighted(y, weights, speed):
        return sum(jnp.sum(jnp.sin(jnp.arange(a.size)).reshape(a.shape) * a) for a in (y, *weights, *speed))

    def form(params, x):
        y, state = memory.apply(params, x, case.state, case.valid, method=driver.call)
        return weighted(y, state.weights, state.momentum), (y, state.weights, state.momentum)

    def loop(params, x):
        with jax.numpy_rank_promotion("allow"):
            y, states = by_equations(params, x, case)
        fast = jax.tree.map(
            lambda *heads: jnp.stack(heads), *[jax.tree.map(lambda *h: jnp.stack(h), *s) for s in states]
        )
        return weighted(y, *fast), (y, *map(tuple, fast))

    got, want = (
        jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True), compiler_options=UNOPTIMIZED)(case.params, case.x)
        for f in (form, loop)
    )
    assert_close(got, want)
    for path, leaf in jax.tree_util.tree_leaves_with_path(got[0][0]):
        assert np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)


def fed(case: Case, state: TitansState, lengths: list[int]):
    """A segment in pieces, each padded to 1, 5 or 12 tokens; answers, frozen reads, and the state after it."""
    opened, first, answers, asked = case.open(state), 0, [], []
    for length in lengths:
        size = next(size for size in (1, 5, 12) if size >= length)
        step = np.arange(size)
        slot = np.broadcast_to(np.where(step < length, first + step, T), (B, size))
        piece = case.x[:, np.minimum(first + step, T - 1)]
        frozen, opened = case.ask(piece, slot, opened)
        y, opened = case.extend(piece, slot, opened)
        answers.append(y[:, :length])
        asked.append(frozen[:, :length])
        first += length
    return jnp.concatenate(answers, axis=1), jnp.concatenate(asked, axis=1), case.close(opened)


@pytest.mark.parametrize("lengths", [[12], [1] * 12, [5, 1, 4, 2], [3, 5, 1, 3]])
def test_pieces_equal_one_call(case, lengths):
    """From a used state, so that tails and momentum matter."""
    state = used(case)
    y, after = case.call(case.x, state, case.valid)
    got, frozen, closed = fed(case, state, lengths)
    assert_close(got, y)
    assert_close(closed, after)
    assert_close(frozen, case.read(case.x, state))


def test_each_row_has_its_own_position():
    """Row 0 is fed 5 + 1 + 5 + 1 tokens, row 1 0 + 5 + 2 + 5, in the same calls."""
    case = variant("default")
    y, after = case.call(case.x, case.state, case.valid)
    opened, at = case.open(case.state), np.zeros(B, int)
    for lengths in ((5, 0), (1, 5), (5, 2), (1, 5)):
        step = np.arange(5)[None]
        live = step < np.array(lengths)[:, None]
        slot = np.where(live, at[:, None] + step, T)
        piece = np.take_along_axis(np.asarray(case.x), np.minimum(slot, T - 1)[:, :, None], axis=1)
        got, opened = case.extend(jnp.asarray(piece), slot, opened)
        for row, length in enumerate(lengths):
            assert_close(got[row, :length], y[row, at[row] : at[row] + length])
        at += lengths
    assert_close(case.close(opened), after)


def test_storing_is_extending_without_answers():
    case = variant("default")
    slot = np.broadcast_to(np.arange(5), (B, 5))
    opened = case.open(case.state)
    stored = case.program(driver.store)(case.x[:, :5], slot, T, opened)
    assert_close(stored, case.extend(case.x[:, :5], slot, opened)[1])


def test_a_border_leaves_no_trace(case):
    """Convolutions and momentum continue: 8 tokens, then 4, equal 12."""
    y, after = case.call(case.x, case.state, case.valid)
    first, state = case.call(case.x[:, :8], case.state, case.valid[:, :8])
    second, state = case.call(case.x[:, 8:], state, case.valid[:, 8:])
    assert_close(jnp.concatenate([first, second], axis=1), y)
    assert_close(state, after)


def test_writing_is_calling_without_answers(case):
    assert_close(
        case.program(driver.write)(case.x, case.state, case.valid), case.call(case.x, case.state, case.valid)[1]
    )


def test_padding_at_the_end_changes_nothing(case):
    """Neither its values nor its presence: the next segment continues after the last valid token."""
    short, padded = case.valid.at[:, 8:].set(False), case.x.at[:, 8:].set(7.0)
    _, state = case.call(padded, case.state, short)
    want_state = case.call(case.x[:, :8], case.state, case.valid[:, :8])[1]
    assert_close(state, want_state)
    assert_equal(case.call(case.x, case.state, short)[1], state)
    assert_close(case.call(case.x[:, 8:], state, short[:, :4])[0], case.call(case.x, case.state, case.valid)[0][:, 8:])


def test_padding_is_seen_nowhere(case):
    """In the middle of a chunk, at its first token, in all but one token of a row."""
    valid = case.valid.at[0, 5:8].set(False).at[0, 0].set(False).at[1, :11].set(False)
    y, state = case.call(case.x, case.state, valid)
    noise = jnp.where(valid[:, :, None], case.x, case.x + 3.0)
    other, other_state = case.call(noise, case.state, valid)
    assert_equal(other_state, state)
    assert_equal(jnp.where(valid[:, :, None], other, 0), jnp.where(valid[:, :, None], y, 0))


def test_the_tail_takes_the_last_valid_inputs():
    """Two valid tokens in a segment: the oldest of three inputs is the last one of the segment before."""
    case = variant("default")
    before = used(case)
    valid = jnp.zeros((B, T), bool).at[:, 3].set(True).at[:, 7].set(True)
    _, state = case.call(case.x, before, valid)
    for name, old, new in zip("qkv", before.tails, state.tails, strict=True):
        w = case.params["params"][name]["w"]["w"]
        want = jnp.einsum("btd,dhk->bthk", case.x[:, jnp.asarray([3, 7])], w)
        assert_close(new, jnp.concatenate([old[:, -1:], want], axis=1))


def test_no_token_sees_a_later_one(case):
    """Bit for bit, at each of the places of a chunk."""
    y, _ = case.call(case.x, case.state, case.valid)
    for place in range(1, 9):
        other, _ = case.call(case.x.at[:, place].add(1.0), case.state, case.valid)
        np.testing.assert_array_equal(other[:, :place], y[:, :place])
        assert (np.abs(other[:, place:] - y[:, place:]) > 1e-6).any()


def test_rows_are_alone(case):
    y, after = case.call(case.x, case.state, case.valid)
    other, state = case.call(case.x.at[0].add(1.0), case.state, case.valid)
    np.testing.assert_array_equal(other[1], y[1])
    assert_equal(jax.tree.map(lambda a: a[1], state), jax.tree.map(lambda a: a[1], after))


def test_a_reset_row_is_a_fresh_row(case):
    """Weights, momentum and tails of the text before are gone; a frozen read sees the start too."""
    reset = reset_rows(used(case), jnp.asarray([True, False]), case.memory.state_axes())
    y, after = case.call(case.x, reset, case.valid)
    fresh, fresh_after = case.call(case.x, case.state, case.valid)
    assert_close(y[0], fresh[0])
    assert_close(jax.tree.map(lambda a: a[0], after), jax.tree.map(lambda a: a[0], fresh_after))
    assert np.abs(y[1] - fresh[1]).max() > 1e-3
    assert_close(case.read(case.x, reset)[0], case.read(case.x, case.state)[0])


def test_every_parameter_has_a_gradient(case):
    """Of the answers alone, starts and gates included."""

    memory = without_remat(case)

    def total(params):
        y, _ = memory.apply(params, case.x, case.state, case.valid, method=driver.call)
        return jnp.sum(jnp.sin(jnp.arange(y.size)).reshape(y.shape) * y)

    grads = jax.jit(jax.grad(total), compiler_options=UNOPTIMIZED)(case.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)


def test_metrics_by_hand():
    """A linear memory that starts at 0 sees one pair twice, another pair once, then padding."""
    config = TitansConfig(
        1, 2, LinearNetwork(), step=StepConfig("fixed", 0.25), conv_tokens=0, silu=False, unit_keys=False
    )
    memory = config.build(2, FLOAT64)
    x, valid, state = (
        jnp.eye(2)[None, jnp.asarray([0, 0, 1, 0])],
        jnp.asarray([[True] * 3 + [False]]),
        memory.init_state(1),
    )
    shapes = nn.unbox(jax.eval_shape(driver.init(memory), jax.random.key(0), x, state, valid))["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    params |= {n: {"w": {"w": jnp.eye(2)[:, None]}} for n in "qkv"}
    for gate in ("gate_momentum", "gate_forget"):
        params[gate]["b"]["b"] = jnp.full(1, -1e3)

    @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
    def write(params):
        metrics: dict = {}
        return memory.apply({"params": params}, x, state, valid, metrics, method=driver.write), metrics

    after, metrics = write(params)
    # Each step goes 0.25 * 2 of the way from its chunk's start: two together all of it, one alone half.
    np.testing.assert_allclose(after.weights[0][0, 0], [[1, 0], [0, 0.5]], atol=1e-12)
    assert metrics == {
        "surprise": pytest.approx(2),
        "step_size": pytest.approx(0.25),
        "momentum": pytest.approx(0),
        "forgetting": pytest.approx(0),
        "inner_loss_before": pytest.approx(1),
        "inner_loss_after": pytest.approx(0.25),
        "state_norm": pytest.approx(np.sqrt(1.25)),
    }


def test_the_state_is_float32_at_least_unless_it_may_be_narrow():
    narrow = Precision(compute="bfloat16", state="bfloat16")
    config = VARIANTS["default"]
    for allowed, dtype in ((False, jnp.float32), (True, jnp.bfloat16)):
        memory = dataclasses.replace(config, narrow_state=allowed).build(D, narrow)
        state = memory.init_state(1)
        assert {leaf.dtype for leaf in (*state.weights, *state.momentum)} == {jnp.dtype(dtype)}
        x, valid = jnp.ones((1, T, D), jnp.bfloat16), jnp.ones((1, T), bool)
        (y, after), _ = jax.eval_shape(
            functools.partial(memory.init_with_output, method=driver.call), jax.random.key(0), x, state, valid
        )
        assert y.dtype == jnp.bfloat16
        assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)
        assert memory.inner_dtype == jnp.float32


def test_the_axes_fit_the_state(case):
    axes = jax.tree.structure(case.state).flatten_up_to(case.memory.state_axes())
    for leaf, names in zip(jax.tree.leaves(case.state), axes, strict=True):
        assert leaf.ndim == len(names)
        assert leaf.shape[names.index("batch")] == B


def test_what_the_optimizer_makes_of_the_parameters():
    memory = TitansConfig(H, C, step=StepConfig(by_place=True)).build(D, Precision())
    x, state = jnp.ones((1, T, D), jnp.float32), memory.init_state(1)
    boxed = jax.eval_shape(driver.init(memory), jax.random.key(0), x, state, jnp.ones((1, T), bool))["params"]
    found = {p.path: p.role for p in jax.tree.leaves(describe(boxed))}
    gates = {f"gate_{n}/{leaf}": "gate" for n in GATES for leaf in ("w/w", "b/b")}
    streams = {f"{n}/{leaf}": kind for n in "qkv" for leaf, kind in (("w/w", "weight"), ("conv/w", "conv"))}
    assert found == {
        **gates,
        **streams,
        "gate_output/w": "gate",
        "start_0": "start",
        "start_1": "start",
        "inner_norm/scale": "norm",
        "inner_norm/b": "norm",
        "norm/scale": "norm",
        "place/b": "bias",
        "o/w": "weight",
    }


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TitansConfig(0), "memory.num_heads"),
        (lambda: TitansConfig(chunk_tokens=0), "memory.chunk_tokens"),
        (lambda: TitansConfig(conv_tokens=-1), "memory.conv_tokens"),
        (lambda: TitansConfig(step=StepConfig(maximum=0.0)), "memory.step.maximum"),
        (lambda: TitansConfig(3).build(8, Precision()), "decoder.width=8 is not a multiple of memory.num_heads=3"),
        (lambda: TitansConfig(chunk_tokens=5).check_segment(12), "memory.chunk_tokens=5 must divide"),
        (
            lambda: ModelConfig(segment_tokens=10, memory=TitansConfig(chunk_tokens=4), join=GateJoin()),
            "memory.chunk_tokens=4 must divide",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
