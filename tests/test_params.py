"""Canonical names of parameters: one array for each layer, however equal blocks are grouped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import lm2_jax
from lm2_jax.errors import UserError
from lm2_jax.model import LanguageModel
from lm2_jax.params import entries, flatten, from_canonical, load_by_name, nest, to_canonical
from lm2_jax.training.state import make_plan

PRESETS = [name for name in lm2_jax.PRESETS if name.endswith("_tiny")]


def shapes_of(name):
    config = lm2_jax.preset(name)
    return make_plan(config, LanguageModel(config.model)).shapes


def distinct(shapes):
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.standard_normal(leaf.shape), leaf.dtype), shapes)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_and_moments_of_every_preset_come_back(preset):
    shapes = shapes_of(preset)
    for tree in (shapes.params, shapes.opt_state):
        arrays = distinct(tree)
        named = to_canonical(arrays)
        assert not any("blocks_" in name for name in named)
        assert flatten(nest(named)).keys() == named.keys()
        back = from_canonical(named, arrays)
        assert jax.tree.structure(back) == jax.tree.structure(arrays)
        for a, b in zip(jax.tree.leaves(arrays), jax.tree.leaves(back), strict=True):
            assert a.dtype == b.dtype
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_names_do_not_depend_on_the_groups():
    one = {"blocks_0": {"w": jnp.arange(12.0).reshape(4, 3)}, "head": jnp.ones(2)}
    two = {"blocks_0": {"w": jnp.arange(3.0)[None]}, "blocks_1": {"w": jnp.arange(3.0, 12.0).reshape(3, 3)},
           "head": jnp.ones(2)}  # fmt: skip
    assert sorted(to_canonical(one)) == ["head", *(f"layers/{layer}/w" for layer in range(4))]
    for a, b in zip(jax.tree.leaves(from_canonical(to_canonical(one), two)), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
    (moment,) = [entry for entry in entries(({"mu": {"blocks_2": {"w": jnp.ones((2, 3))}}},)) if entry.stacked]
    assert moment.names == ("0/mu/layers/2/w", "0/mu/layers/3/w")


def test_slices_and_stacks_keep_their_sharding():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    sharding = NamedSharding(mesh, PartitionSpec(None, "b", None))
    whole = {"blocks_0": {"w": jax.device_put(jnp.arange(24.0).reshape(3, 4, 2), sharding)}}
    named = to_canonical(whole)
    assert {part.sharding.spec for part in named.values()} == {PartitionSpec("b", None)}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), whole)
    assert to_canonical(like)["layers/1/w"].sharding.spec == PartitionSpec("b", None)
    back = from_canonical(named, like)["blocks_0"]["w"]
    assert back.sharding == sharding
    np.testing.assert_array_equal(back, whole["blocks_0"]["w"])
    staged = NamedSharding(mesh, PartitionSpec(None, None, "a"))
    moved = {name: jax.device_put(part, NamedSharding(mesh, PartitionSpec(None, "a"))) for name, part in named.items()}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=staged), whole)
    np.testing.assert_array_equal(from_canonical(moved, like)["blocks_0"]["w"], whole["blocks_0"]["w"])


def params_of(name, **decoder):
    config = lm2_jax.preset(name)
    model = dataclasses.replace(config.model, decoder=dataclasses.replace(config.model.decoder, **decoder))
    config = dataclasses.replace(config, model=model)
    return distinct(make_plan(config, LanguageModel(config.model)).shapes.params)


def test_a_decoder_is_loaded_into_a_model_with_another_memory():
    plain, lm2 = params_of("none_tiny"), params_of("lm2_tiny")
    named = to_canonical(plain)
    loaded = load_by_name(named, lm2)
    after, before = to_canonical(loaded.params), to_canonical(lm2)
    assert set(loaded.taken) == set(named) & set(before)
    assert loaded.taken, "nothing was taken"
    assert loaded.missing
    assert not set(loaded.missing) & set(named)
    for name, array in after.items():
        expected = named if name in loaded.taken else before
        assert np.asarray(array).tobytes() == np.asarray(expected[name]).tobytes(), name
    back = load_by_name(before, plain)
    assert set(back.unused) == set(before) - set(named)
    assert "keep their initial values" in loaded.report("x")
    assert "are not used" in back.report("x")


def test_another_shape_is_an_error_that_names_the_arrays():
    with pytest.raises(UserError, match=r"layers/0/\S+: \(.*32.*\) there, \(.*64.*\) here") as caught:
        load_by_name(to_canonical(params_of("none_tiny", width=32, num_heads=4)), params_of("none_tiny", width=64))
    assert caught.value.status == 1


def test_one_device_is_a_sharding_too():
    one = SingleDeviceSharding(jax.devices()[0])
    tree = {"blocks_0": {"w": jax.device_put(jnp.ones((2, 3)), one)}}
    assert from_canonical(to_canonical(tree), tree)["blocks_0"]["w"].sharding == one
