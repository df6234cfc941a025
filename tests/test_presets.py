"""Presets that are compared have equal parameters."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import lm2_jax
from configs import babilong_small, probe, probe_titans


def parameters(name: str) -> int:
    """How many a preset has, without making them."""
    config = lm2_jax.preset(name).model
    model = lm2_jax.build_model(config)
    tokens = jnp.zeros((1, config.segment_tokens), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens, model.init_state(1)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", sorted({*probe.PRESETS, *probe_titans.PRESETS, *babilong_small.PRESETS}))
def test_compared_presets_have_equal_parameters(name):
    twin = "babilong_small_none" if name in babilong_small.PRESETS else "probe_none"
    assert abs(parameters(name) / parameters(twin) - 1) < 0.03


def test_small_means_at_most_three_million_parameters():
    assert max(parameters(name) for name in babilong_small.PRESETS) <= 3_000_000
