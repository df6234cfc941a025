"""The models at published sizes: parameters, and meshes on which every array has its place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm2_jax
from lm2_jax.interop.hf_config import read_hf_config
from lm2_jax.model import LanguageModel
from lm2_jax.presets import mesh_for, published
from lm2_jax.sharding import Layout, MeshConfig
from lm2_jax.sharding.check import assert_sharded
from lm2_jax.sharding.mesh import planned_mesh
from lm2_jax.training.objective import batch_shapes
from lm2_jax.training.optim import learning_rate
from lm2_jax.training.state import make_plan


@functools.cache
def plan(name, rows=64):
    run = lm2_jax.preset(name)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, rows=rows))
    return make_plan(run, LanguageModel(run.model))


def parameters(name):
    return sum(leaf.size for leaf in jax.tree.leaves(plan(name).shapes.params))


def test_lm2_has_the_published_size():
    """1.2 billion of the decoder and half a billion of the memory (section 3)."""
    assert parameters("lm2_1p7b") == pytest.approx(1.7e9, rel=0.03)
    memory = 16 * 7 * 2048 * 2048  # q, k, v, three gates, start
    assert parameters("lm2_1p7b") - memory == pytest.approx(1.2e9, rel=0.04)
    model = lm2_jax.preset("lm2_1p7b").model
    assert (model.decoder.width, model.decoder.mlp_width, model.vocab_size) == (2048, 8192, 128_256)
    assert (model.memory.num_slots, model.memory.write.kind, model.join.read) == (2048, "content", "own")


@pytest.mark.parametrize("name", ["lm2_1p7b", "lm2_8b"])
def test_the_paper_s_equations_have_a_preset_of_their_own(name):
    ours, printed = lm2_jax.preset(name), lm2_jax.preset(f"{name}_paper")
    assert (printed.model.memory.write.kind, printed.model.memory.norm_slots) == ("paper", False)
    assert parameters(f"{name}_paper") == pytest.approx(parameters(name), rel=1e-3)
    assert dataclasses.replace(printed, name=ours.name, model=ours.model) == ours


@pytest.mark.slow
@pytest.mark.parametrize(("name", "is_seen"), [("lm2_1p7b", True), ("lm2_1p7b_paper", False)])
def test_what_a_segment_writes_is_more_than_bfloat16_rounds(name, is_seen):
    """Banks after two different texts, 2,048 slots of 2,048; in the paper's form they are equal up to rounding."""
    config = lm2_jax.preset(name).model
    D, T, valid = config.decoder.width, config.segment_tokens, jnp.ones((1, config.segment_tokens), bool)
    bank = config.memory.build(D, config.precision)
    texts = [jax.random.normal(jax.random.key(seed), (1, T, D), jnp.bfloat16) for seed in (1, 2)]

    def write(bank, x):
        return bank.write(x, bank.start_state(), valid).slots

    params = jax.jit(functools.partial(bank.init, method=write))(jax.random.key(0), texts[0])
    apply = jax.jit(functools.partial(bank.apply, method=write))
    first, second = (np.asarray(apply(params, x), np.float64) for x in texts)
    difference = np.linalg.norm(first - second, axis=-1) / np.linalg.norm(first, axis=-1)  # of each slot
    assert (difference > 10 * float(jnp.finfo(jnp.bfloat16).eps)).all() == is_seen


def test_its_twin_has_as_many_and_the_large_one_is_of_8_billion():
    assert parameters("llama_1p7b") == pytest.approx(parameters("lm2_1p7b"), rel=0.03)
    assert 7e9 < parameters("lm2_8b") <= 8e9
    assert parameters("titans_mac_1p3b") == pytest.approx(1.3e9, rel=0.03)


def test_hmt_adds_what_the_released_code_adds_to_smollm():
    """Two projections, the prompt and the first row; the decoder's rows are 1,024 long, a summary half."""
    assert parameters("hmt_135m") == 134_515_008 + 2 * 576 * 1536 + 2 * 576
    model = lm2_jax.preset("hmt_135m").model
    stack = model.join.stack(model.block_spec, parent=None)
    assert stack.prefix_tokens + model.segment_tokens + stack.suffix_tokens == 1024
    assert stack.summary_tokens == 495


def test_the_recipes_of_rmt_and_armt_are_around_gpt2():
    """The decoder has GPT-2's 124,439,808 parameters; ARMT adds three projections, a gate and tokens to them."""
    per_layer = 2 * 768 * 64 + 768 * 768 + 768 + 1
    assert parameters("rmt_babilong") == 124_439_808 + 16 * 768
    assert parameters("armt_babilong") == 124_439_808 + 10 * 768 + 12 * per_layer
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 50_257, "n_embd": 768, "n_layer": 12, "n_head": 12}
    spec = read_hf_config({**gpt2, "n_inner": None, "n_positions": 1024}, "config.json")
    for name in ("rmt_babilong", "armt_babilong"):
        run = lm2_jax.preset(name)
        assert (run.model.decoder, run.model.vocab_size) == (spec.decoder, spec.vocab_size)
        rate = learning_rate(run.optim)
        assert float(rate(run.optim.steps)) == pytest.approx(run.optim.learning_rate / 2)


@pytest.mark.parametrize(
    ("name", "devices"), [(name, devices) for name, meshes in published.MESHES.items() for devices in meshes]
)
def test_every_array_has_its_place_on_the_noted_mesh(name, devices):
    mesh = mesh_for(name, devices)
    assert mesh.sizes(devices)
    layout = Layout(planned_mesh(mesh))
    config = plan(name, 256 if devices > 1024 else 64).config
    run = plan(name, config.data.rows)
    places = run.shardings(layout)  # an array that does not divide is an error
    assert_sharded(run.shapes.params, places.params)
    batch = batch_shapes(config.data.rows, max(config.data.segments), config.model.segment_tokens)
    layout.shardings(jax.tree.map(lambda leaf: ("batch", *[None] * (leaf.ndim - 1)), batch), batch)


def test_a_mesh_that_nobody_noted_is_copies():
    assert mesh_for("lm2_1p7b", 7) == MeshConfig()
    assert mesh_for("lm2_tiny", 16) == MeshConfig()
