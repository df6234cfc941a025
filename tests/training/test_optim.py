"""Learning rates, selectors of parameters, the optimizers, and types of their state."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lm2_jax
from lm2_jax.config import OptimConfig
from lm2_jax.errors import UserError
from lm2_jax.layers import Einsum, named
from lm2_jax.memory.base import Memory
from lm2_jax.model import LanguageModel
from lm2_jax.parameters import Parameter, Role, describe, init_parameters
from lm2_jax.precision import Precision
from lm2_jax.training.optim import (
    decays,
    learning_rate,
    make_optimizer,
    merge,
    rate_of,
    select,
    selects,
    trainable,
)
from lm2_jax.training.optim_config import AdamW, Cosine, Linear, Muon, WarmupStableDecay, matrix_dimensions
from lm2_jax.training.state import make_plan

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "optimizer_classes.json").read_text())


def test_learning_rate_by_hand():
    rate = learning_rate(OptimConfig(steps=110, warmup_steps=10, learning_rate=1.0, final_fraction=0.1))
    assert float(rate(0)) == pytest.approx(1 / 11)
    assert float(rate(4)) == pytest.approx(5 / 11)
    assert float(rate(10)) == pytest.approx(1.0)
    assert float(rate(60)) == pytest.approx(0.55), "half way down the cosine"
    assert float(rate(35)) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert float(rate(110)) == pytest.approx(0.1)


def test_the_cosine_is_that_of_optax_bit_for_bit():
    config = OptimConfig(steps=37, warmup_steps=5, learning_rate=3e-3, final_fraction=0.1)
    expected = optax.warmup_cosine_decay_schedule(3e-3 / 6, 3e-3, 5, 37, 3e-3 * 0.1)
    with jax.numpy_dtype_promotion("standard"):
        assert [float(learning_rate(config)(t)) for t in range(40)] == [float(expected(t)) for t in range(40)]


def test_other_schedules_by_hand():
    common = {"steps": 110, "warmup_steps": 10, "learning_rate": 1.0, "final_fraction": 0.2}
    linear = learning_rate(OptimConfig(**common, schedule=Linear()))
    assert [float(linear(t)) for t in (4, 10, 60, 110)] == pytest.approx([5 / 11, 1.0, 0.6, 0.2])
    stable = learning_rate(OptimConfig(**common, schedule=WarmupStableDecay(decay_fraction=0.2)))
    assert [float(stable(t)) for t in (4, 10, 60, 88, 99, 110)] == pytest.approx([5 / 11, 1.0, 1.0, 1.0, 0.6, 0.2])


def test_a_decay_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"decay_fraction=0.6 .* 66 steps .* the 60 steps after the warm-up"):
        OptimConfig(steps=110, warmup_steps=50, schedule=WarmupStableDecay(decay_fraction=0.6))


def test_without_warmup_the_peak_comes_first():
    assert float(learning_rate(OptimConfig(warmup_steps=0, learning_rate=0.5))(0)) == pytest.approx(0.5)


def declared(config):
    """The declaration of each parameter of a model, by path."""
    run = dataclasses.replace(lm2_jax.preset("lm2_tiny"), model=config)
    return {p.path: p for p in jax.tree.leaves(make_plan(run, LanguageModel(config)).parameters)}


def golden_config(name):
    """A preset, or one of the two variants with parameters that no preset has."""
    preset, _, variant = name.partition(" ")
    config, replace = lm2_jax.preset(preset).model, dataclasses.replace
    if not variant:
        return config
    if preset == "lm2_tiny":
        return replace(
            config,
            memory=replace(config.memory, start="learned"),
            join=replace(config.join, silent_start=True),
            decoder=replace(config.decoder, tie_head=False),
        )
    memory = config.memory
    step, network = replace(memory.step, by_place=True), replace(memory.network, bias=True)
    return replace(config, memory=replace(memory, step=step, network=network))


OLD_KINDS = {
    Role.WEIGHT: "matrix",
    Role.EMBEDDING: "matrix",
    Role.HEAD: "matrix",
}


QUICK = {"hybrid_tiny", "rmt_tiny", *(name for name in GOLDEN if " " in name)}  # each other model has fewer parameters


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in GOLDEN])
def test_each_parameter_is_treated_as_before_roles_were_declared(name):
    """Golden values: what the words in a path said before. They misjudged no parameter of these models."""
    config = OptimConfig(gate_multiplier=2.0, memory_multiplier=3.0)
    rates = {1.0: "base", 2.0: "gate", 3.0: "memory"}

    def described(p):
        decay = "decays" if decays(p, config) else "keeps"
        return f"{OLD_KINDS.get(p.role, p.role)} {decay} {rates[rate_of(p, config)]}"

    assert {path: described(p) for path, p in declared(golden_config(name)).items()} == GOLDEN[name]


def test_the_name_of_a_parameter_says_nothing():
    """By its name, the gate projection of a SwiGLU was once a gate without weight decay."""
    gate_proj = Parameter("mlp/gate_proj/w", ("embed", "mlp"), Role.WEIGHT)
    assert decays(gate_proj, OptimConfig())
    assert rate_of(gate_proj, OptimConfig(gate_multiplier=5.0)) == 1.0


class Inner(nn.Module):
    """Made by a memory; knows nothing of it."""

    @nn.compact
    def __call__(self, x):
        return x + self.param("shift", named(nn.initializers.zeros, ("embed",)), (3,), jnp.float32)[None]


class NewMemory(Memory):
    """As an author would write it: nothing is said about groups."""

    def setup(self):
        self.q = Einsum((3, 3), ("embed", "embed"), Precision())
        self.inner = Inner()

    def __call__(self, x, _):
        return self.inner(self.q("bd,de->be", x)), ()


class Around(nn.Module):
    """A stack of rematerialised blocks with a memory each, and a parameter outside."""

    def setup(self):
        block = nn.scan(
            nn.remat(NewMemory),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=0,
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.store = block()
        self.o = Einsum((3, 3), ("embed", "embed"), Precision(), role=Role.GATE)

    def __call__(self, x):
        return self.o("bd,de->be", self.store(x, jnp.zeros((2, 1)))[0])


def test_what_a_memory_makes_belongs_to_it_also_in_stacked_rematerialised_blocks():
    boxed = jax.eval_shape(
        lambda: init_parameters(lambda: Around().init(jax.random.key(0), jnp.zeros((1, 3)))["params"])
    )
    found = {p.path: p for p in jax.tree.leaves(describe(boxed))}
    facts = {path: (p.axes, p.role, p.group) for path, p in found.items()}
    assert facts == {
        "o/w": (("embed", "embed"), Role.GATE, None),
        "store/q/w": (("layers", "embed", "embed"), Role.WEIGHT, "memory"),
        "store/inner/shift": (("layers", "embed"), Role.BIAS, "memory"),
    }
    params = jax.tree.leaves(nn.unbox(boxed))
    assert [x.shape for x in params] == [(3, 3), (2, 3), (2, 3, 3)]


PARAMETERS = {
    "mlp": {"w": Parameter("mlp/w", ("embed", "mlp"), Role.WEIGHT)},
    "norm": {"scale": Parameter("norm/scale", ("embed",), Role.NORM)},
    "gate_output": {"w": Parameter("gate_output/w", ("embed", "embed"), Role.GATE)},
    "memory": {
        "q": {"w": Parameter("memory/q/w", ("embed", "embed"), Role.WEIGHT, group="memory")},
        "start": Parameter("memory/start", ("slots", "embed"), Role.START, group="memory"),
        "gate_input": {"w": Parameter("memory/gate_input/w", ("embed", "embed"), Role.GATE, group="memory")},
    },
}


def optim(**fields):
    return OptimConfig(**{"steps": 10, "warmup_steps": 0} | fields)


def optimizer_of(config, precision=Precision()):
    return make_optimizer(config, precision, select(trainable(PARAMETERS, config), PARAMETERS))


def first_update(config, grads, params):
    optimizer = optimizer_of(config)
    return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]


def ones():
    return jax.tree.map(lambda p: jnp.ones([3] * len(p.axes)), PARAMETERS)


def zeros():
    return jax.tree.map(jnp.zeros_like, ones())


def test_only_matrices_decay():
    """With no gradient an update is nothing but decay: -rate * decay * parameter."""
    update = first_update(optim(learning_rate=0.5, weight_decay=0.2), zeros(), ones())
    moved = {
        jax.tree_util.keystr(path): float(x.flatten()[0]) for path, x in jax.tree_util.tree_leaves_with_path(update)
    }
    assert moved == pytest.approx(
        {
            "['mlp']['w']": -0.1,
            "['memory']['q']['w']": -0.1,
            "['norm']['scale']": 0.0,
            "['gate_output']['w']": 0.0,
            "['memory']['start']": 0.0,
            "['memory']['gate_input']['w']": 0.0,
        }
    )


def test_gates_and_memory_learn_at_their_own_rates():
    """Adam's first update is the rate times the sign of the gradient."""
    config = optim(learning_rate=1.0, weight_decay=0.0, gate_multiplier=0.25, memory_multiplier=3.0)
    update = first_update(config, ones(), zeros())
    expected = {"mlp": 1.0, "norm": 1.0, "gate_output": 0.25}
    for name, rate in expected.items():
        np.testing.assert_allclose(jax.tree.leaves(update[name])[0], -rate, rtol=1e-5)
    np.testing.assert_allclose(update["memory"]["q"]["w"], -3.0, rtol=1e-5)
    np.testing.assert_allclose(update["memory"]["start"], -3.0, rtol=1e-5)
    np.testing.assert_allclose(update["memory"]["gate_input"]["w"], -0.25, rtol=1e-5)


def test_clipping_bounds_the_whole_gradient():
    """What Adam sees is the clipped gradient: its first moment is (1 - beta1) of it."""
    config = optim(clip_norm=0.5)
    optimizer = optimizer_of(config)
    _, state = optimizer.update(jax.tree.map(lambda x: 100 * x, ones()), optimizer.init(zeros()), zeros())
    moment = optax.tree.get(state, "mu")
    assert float(optax.tree.norm(moment)) == pytest.approx(0.5 * (1 - config.beta1), rel=1e-5)


def test_types_of_the_moments():
    precision = Precision(params="bfloat16", moments="bfloat16", master_copy=False)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), ones())
    optimizer = optimizer_of(optim(), precision)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(state, "mu"))} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(state, "nu"))} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


def drawn(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype), ones())


def test_adamw_is_the_chain_of_optax_bit_for_bit():
    """The chain as it was written before optimizers became a family; its state has the same structure too."""
    config = optim(learning_rate=0.01, gate_multiplier=0.5, memory_multiplier=3.0, weight_decay=0.1, beta2=0.95)
    decay = jax.tree.map(lambda p: p.role == Role.WEIGHT, PARAMETERS)
    rates = jax.tree.map(lambda p: 0.5 if p.role == Role.GATE else 3.0 if p.group else 1.0, PARAMETERS)
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(0.9, 0.95, 1e-8, mu_dtype=jnp.dtype("float32")),
        optax.add_decayed_weights(0.1, mask=decay),
        optax.stateless(lambda updates, _: jax.tree.map(lambda rate, u: rate * u, rates, updates)),
        optax.scale_by_learning_rate(optax.warmup_cosine_decay_schedule(0.01, 0.01, 0, 10, 0.001)),
    )
    ours, state, expected, params = optimizer_of(config), None, None, drawn(0)
    state, expected = ours.init(params), reference.init(params)
    for step in range(4):
        grads = drawn(1 + step)
        updates, state = jax.jit(ours.update)(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            wanted, expected = jax.jit(reference.update)(grads, expected, params)
        jax.tree.map(np.testing.assert_array_equal, (updates, state), (wanted, expected))
        params = optax.apply_updates(params, updates)
    assert jax.tree.structure(state) == jax.tree.structure(expected)


def test_a_parameter_without_a_declaration_is_refused():
    class Undeclared(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("gain", nn.initializers.ones, (3,))[None]

    with pytest.raises(ValueError, match="parameter params/gain is not declared"):
        init_parameters(lambda: Undeclared().init(jax.random.key(0), jnp.ones((1, 3))))


def test_selectors():
    parameter = Parameter("blocks_0/memory/q/w", ("embed", "heads"), Role.WEIGHT, group="memory")
    assert all(selects(s, parameter) for s in ("weight", "memory", "blocks_0", "blocks_0/memory/q", "*/q/*", "*/q/w"))
    assert not any(selects(s, parameter) for s in ("gate", "memory/q", "blocks", "*/k/*", "blocks_0/mem"))


def test_the_last_rate_that_selects_a_parameter_counts():
    config = optim(memory_multiplier=3.0, gate_multiplier=0.5, rates=("memory=2", "memory/q=0.25"))
    found = jax.tree.map(lambda p: rate_of(p, config), PARAMETERS)
    assert found["memory"] == {"q": {"w": 0.25}, "start": 2.0, "gate_input": {"w": 2.0}}
    assert (found["mlp"]["w"], found["gate_output"]["w"]) == (1.0, 0.5)


def test_weight_decay_by_selector():
    config = optim(learning_rate=0.5, weight_decay=0.2, decay_on=("norm", "memory/q/*"))
    update = first_update(config, zeros(), ones())
    moved = {path for path, p in zip(jax.tree.leaves(PARAMETERS), jax.tree.leaves(update), strict=True) if p.any()}
    assert {p.path for p in moved} == {"norm/scale", "memory/q/w"}


@pytest.mark.parametrize("rule", ["memory", "=3", "memory=", "memory=fast", "memory=-1", "memory=nan", "memory=inf"])
def test_a_rate_that_is_none_is_refused(rule):
    with pytest.raises(ValueError, match=r"optim.rates: expected SELECTOR=FACTOR"):
        optim(rates=(rule,))


@pytest.mark.parametrize("field", ["freeze", "decay_on", "rates"])
def test_a_selector_without_a_parameter_is_refused(field):
    value = "memry=2" if field == "rates" else "memry"
    with pytest.raises(UserError, match=rf"optim.{field}: 'memry' selects no parameter.* Did you mean 'memory'"):
        optimizer_of(optim(**{field: (value,)}))


def test_not_everything_can_be_frozen():
    with pytest.raises(UserError, match="at least one has to be trained"):
        optimizer_of(optim(freeze=("*",)))


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("algorithm", [AdamW(), Muon()])
def test_frozen_parameters_have_no_optimizer_state(algorithm):
    """By bytes: apart from counters, two moments in float32 of what is trained; here Muon has no matrix of its own."""
    config = optim(freeze=("memory", "embedding", "mlp"), algorithm=algorithm)
    mask = trainable(PARAMETERS, config)
    active = select(mask, ones())
    assert bytes_of(active) == 4 * (3 + 9), "norm/scale and gate_output/w"
    counters = 2 if algorithm.kind == "adamw" else 3 + 3  # Muon: one more, and three coefficients
    assert bytes_of(optimizer_of(config).init(active)) - 4 * counters == 2 * bytes_of(active)
    assert jax.tree.structure(merge(active, ones())) == jax.tree.structure(ones())


def test_dimensions_of_matrices():
    """[layers, D, H, K] are matrices D to H x K, one per layer; [H, K, D] are H x K to D."""
    q = Parameter("q/w", ("layers", "embed", "heads", "head"), Role.WEIGHT, in_dims=1)
    o = Parameter("o/w", ("heads", "head", "embed"), Role.WEIGHT, in_dims=2)
    assert matrix_dimensions(q) == ((1,), (2, 3))
    assert matrix_dimensions(o) == ((0, 1), (2,))
    for role in Role:
        if role != Role.WEIGHT:
            assert matrix_dimensions(dataclasses.replace(q, role=role)) is None
    assert matrix_dimensions(Parameter("b", ("layers", "embed"), Role.WEIGHT)) is None, "a vector"


def test_muon_orthogonalises_each_layer_for_itself():
    """The update of a stack [layers, D, H, K] has singular values near 1 in each layer, times its scale."""
    layers, D, H, K = 3, 8, 2, 2
    parameters = {
        "w": Parameter("w", ("layers", "embed", "heads", "head"), Role.WEIGHT),
        "norm": Parameter("norm", ("layers", "norm"), Role.NORM),
    }
    config = optim(learning_rate=1.0, weight_decay=0.0, clip_norm=math.inf, algorithm=Muon(update_rms=0.2))
    rng = np.random.default_rng(0)
    grads = {
        "w": jnp.asarray(rng.standard_normal((layers, D, H, K)) * np.array([1.0, 10.0, 1e3])[:, None, None, None]),
        "norm": jnp.asarray(rng.standard_normal((layers, D))),
    }
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    optimizer = make_optimizer(config, Precision(), parameters)
    update, state = jax.jit(optimizer.update)(grads, optimizer.init(grads), jax.tree.map(jnp.zeros_like, grads))
    for layer in range(layers):
        matrix = np.asarray(update["w"][layer]).reshape(D, H * K)
        values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * math.sqrt(D))
        assert 0.6 < values.min() < values.max() < 1.3, "in each layer, whatever the size of its gradient"
        assert np.sqrt(np.mean(matrix**2)) == pytest.approx(0.2, rel=0.3)
        assert (matrix.reshape(D, H, K) * np.asarray(grads["w"][layer])).sum() < 0, "downhill"
        alone = make_optimizer(config, Precision(), {"w": Parameter("w", ("embed", "heads", "head"), Role.WEIGHT)})
        one = {"w": grads["w"][layer]}
        expected, _ = alone.update(one, alone.init(one), one)
        np.testing.assert_allclose(matrix, expected["w"].reshape(D, H * K), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(update["norm"], -np.sign(grads["norm"]), rtol=1e-4)
    assert bytes_of(optax.tree.get(state, "nu")) == 4 * layers * D, "Adam's second moment: of the norm alone"


def test_optimizers_of_a_run_are_chosen_by_kind():
    assert {cls.kind for cls in (AdamW, Muon)} == set(type(AdamW()).registry)
    assert {cls.kind for cls in (Cosine, Linear, WarmupStableDecay)} == set(Cosine.registry)


def test_a_master_copy_accumulates_what_bfloat16_would_lose():
    """Updates of 1/1000 of a parameter: 1,000 of them add up with a copy, and none counts without."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), ones())
    grads = jax.tree.map(lambda x: -x, params)
    config = OptimConfig(
        steps=1001, learning_rate=1e-3, warmup_steps=0, final_fraction=1.0, weight_decay=0.0, clip_norm=math.inf
    )
    for is_kept, expected in ((True, 2.0), (False, 1.0)):
        optimizer = optimizer_of(config, Precision(params="bfloat16", master_copy=is_kept))

        def step(_, carry, optimizer=optimizer):
            params, state = carry
            updates, state = optimizer.update(grads, state, params)
            with jax.numpy_dtype_promotion("standard"):
                return optax.apply_updates(params, updates), state

        after, state = jax.jit(lambda p, s: jax.lax.fori_loop(0, 1000, step, (p, s)))(params, optimizer.init(params))
        np.testing.assert_allclose(jax.tree.leaves(after)[0].astype(jnp.float32), expected, rtol=1e-2)
        assert jax.tree.leaves(after)[0].dtype == jnp.bfloat16
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        per_parameter = (bytes_of(params) + bytes_of(state) - 8) / count  # without two counters
        assert per_parameter == (14 if is_kept else 10)


def test_wide_parameters_have_no_master_copy():
    assert bytes_of(optimizer_of(optim()).init(ones())) == 2 * bytes_of(ones()) + 8
