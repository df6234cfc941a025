"""The tiny presets on a mesh: every array is split, and results do not depend on the mesh."""

import jax
import numpy as np
import pytest
from flax import linen as nn

import lm2_jax
from lm2_jax.layout import axes_of
from sharding import Layout, MeshConfig, make_mesh

TINY = sorted(name for name in lm2_jax.PRESETS if name.endswith("_tiny"))
MESH = MeshConfig(data=2, fsdp=2, model=2)
SLOTS = MeshConfig(data=1, fsdp=2, model=2, slots=2)  # divides the 6 slots of lm2_tiny, not the 3 of rmt_tiny
ROWS = 8


@pytest.mark.parametrize("name", TINY)
def test_every_array_of_a_preset_has_its_place(name):
    config = lm2_jax.preset(name).model
    model, layout = lm2_jax.build_model(config), Layout(make_mesh(MESH))
    state = jax.eval_shape(lambda: model.init_state(ROWS))
    tokens = jax.ShapeDtypeStruct((ROWS, config.segment_tokens), np.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens, state)["params"]
    params = nn.unbox(boxed)
    placed = layout.shardings(axes_of(boxed), params)
    replicated = [
        jax.tree_util.keystr(path)
        for (path, leaf), where in zip(
            jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(placed), strict=True
        )
        if leaf.size >= config.decoder.width**2 and where.shard_shape(leaf.shape) == leaf.shape
    ]
    assert not replicated, f"replicated matrices: {replicated}"
    for where, leaf in zip(
        jax.tree.leaves(layout.shardings(model.state_axes(), state)), jax.tree.leaves(state), strict=True
    ):
        assert np.prod(where.shard_shape(leaf.shape)) * 4 <= leaf.size, "split over data and fsdp at least"


@pytest.mark.parity
@pytest.mark.parametrize(("name", "mesh"), [("lm2_tiny", SLOTS), ("rmt_tiny", MESH)])
def test_a_sharded_forward_pass_equals_the_one_on_one_device(name, mesh):
    config = lm2_jax.preset(name).model
    model, layout = lm2_jax.build_model(config), Layout(make_mesh(mesh))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, 2 * config.segment_tokens), np.int32)
    state = model.init_state(ROWS)
    boxed = jax.jit(model.init)(jax.random.key(0), tokens[:, : config.segment_tokens], state)["params"]
    axes, params = axes_of(boxed), nn.unbox(boxed)
    forward = jax.jit(lambda params, tokens, state: model.apply({"params": params}, tokens, state))
    expected = forward(params, tokens, state)

    places = layout.shardings((axes, model.state_axes()), (params, state))
    sharded_params, sharded_state = jax.device_put((params, state), places)
    with layout.context():
        result = forward(sharded_params, layout.batch(tokens), sharded_state)
    sizes, vocab_axis = layout.mesh.shape, expected[0].shape[-1]
    pieces = sizes["data"] * sizes["fsdp"]
    shard = result[0].sharding.shard_shape(expected[0].shape)
    assert (shard[0], shard[-1]) == (ROWS // pieces, vocab_axis // (sizes["model"] * sizes["slots"]))
    memories = [leaf for leaf in jax.tree.leaves(result[1]) if leaf.ndim >= 3]
    assert memories
    for leaf in memories:
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 == leaf.size, "split over rows x slots, or rows"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), result, expected)
