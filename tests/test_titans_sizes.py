"""The published sizes of Titans, without making their parameters."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import lm2_jax
from lm2_jax.presets import titans


def sized(size: str) -> list:
    marks = () if size == "170m" else pytest.mark.slow
    return [pytest.param(f"titans_{size}_{design}", marks=marks) for design in titans.DESIGNS]


@pytest.mark.parametrize("name", [name for size in titans.SIZES for name in sized(size)])
def test_a_preset_has_the_parameters_of_its_name(name):
    config = lm2_jax.preset(name).model
    model = lm2_jax.build_model(config)
    tokens = jnp.zeros((1, config.segment_tokens), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens, model.init_state(1)))
    size = titans.SIZES[name.split("_")[1]]
    assert abs(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / size.parameters - 1) < 0.01
    assert config.decoder.mlp_width >= size.width // 2
