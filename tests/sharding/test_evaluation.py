"""An evaluation on a mesh gives the answers, losses and predictions of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm2_jax
from lm2_jax.data.base import Example
from lm2_jax.data.tokenizers import TokenizerConfig, build_tokenizer
from lm2_jax.evaluation.answerer import Prompt, RunAnswerer
from lm2_jax.runs import Run
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.training.state import make_plan

MESHES = {
    "data8": MeshConfig(data=8),
    "fsdp4_model2": MeshConfig(data=1, fsdp=4, model=2),
    "data2_model2_slots2": MeshConfig(data=2, model=2, slots=2),
}


@pytest.fixture(scope="module")
def alone():
    """An untrained run on one device."""
    config = lm2_jax.preset("lm2_tiny")
    # A vocabulary and a bank that every mesh here divides.
    memory = dataclasses.replace(config.model.memory, num_slots=8)
    model_config = dataclasses.replace(config.model, vocab_size=512, memory=memory)
    config = dataclasses.replace(config, model=model_config)
    model = lm2_jax.build_model(config.model)
    tokens = jnp.zeros((1, config.model.segment_tokens), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, model.init_state(1))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))  # away from the start, where answers hardly differ
    leaves = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, leaves)
    tokenizer = build_tokenizer(TokenizerConfig(kind="bytes"), list, config.model.vocab_size)
    return RunAnswerer(Run(config, model, jax.device_get(params), tokenizer, 7))


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=() if mesh == "data2_model2_slots2" else pytest.mark.slow) for mesh in MESHES]
)
def test_a_mesh_answers_as_one_device(alone, mesh):
    """Five prompts of one to three segments: rows are padded to what the mesh divides."""
    run = alone.run
    layout = Layout(make_mesh(MESHES[mesh], jax.devices()[:8]), config=run.config)
    plan = make_plan(run.config, run.model)
    params = jax.device_put(run.params, layout.shardings(plan.axes.params, plan.shapes.params))
    sharded = RunAnswerer(run._replace(params=params), layout)
    assert max(len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)) == 8

    size = run.config.model.segment_tokens
    draw = np.random.default_rng(0)
    lengths = (1, size, size + 1, 2 * size, 3 * size - 1)
    texts = ["".join(map(chr, draw.integers(97, 123, length))) for length in lengths]
    prompts = [Prompt(run.tokenizer, text) for text in texts]
    given = [sorted((a.number, a.text) for a in one.answers(prompts, 3, rows=5)) for one in (sharded, alone)]
    assert given[0] == given[1]
    assert len({text for _, text in given[1]}) > 1

    for here, there in zip(*(one.losses([p.tokens for p in prompts]) for one in (sharded, alone)), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)

    batch = rows_of_text(draw.integers(0, 256, (5, 2 * size), np.int32))
    np.testing.assert_array_equal(sharded.predict(batch), alone.predict(batch))


def rows_of_text(tokens_BS):
    """A batch of two segments; a document ends in the first row and one begins at its second segment."""
    everywhere = np.ones(tokens_BS.shape, bool)
    valid_BS = everywhere.copy()
    valid_BS[0, 20:32] = False
    reset = np.array([[True, row == 0] for row in range(len(tokens_BS))])
    nowhere = np.zeros(tokens_BS.shape, np.int32)
    return Example(tokens_BS, tokens_BS, ~everywhere, everywhere, valid_BS, reset, nowhere - 1, nowhere)
