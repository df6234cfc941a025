import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lm2_jax
from lm2_jax.blocks.gate import GateJoin
from lm2_jax.config import ModelConfig
from lm2_jax.memory.tokens import TokensConfig
from lm2_jax.precision import Precision
from lm2_jax.state import begin_rows


def make(num_tokens: int = 3, width: int = 256):
    memory = TokensConfig(num_tokens).build(width, Precision())
    state = memory.init_state(2)
    params = nn.unbox(memory.init(jax.random.key(0), method="start_state"))
    return memory, begin_rows(state, memory.apply(params, method="start_state"), memory.state_axes()), params


def test_the_start_has_the_scale_of_the_embedding():
    memory, state, params = make(num_tokens=40)
    rows = memory.apply(params, state, method="rows")
    assert rows.shape == (2, 40, 256)
    assert float(rows.std()) == pytest.approx(1 / 16, rel=0.05)
    np.testing.assert_array_equal(rows[0], rows[1])


def test_what_was_written_is_read_next():
    memory, state, params = make()
    written = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 256)), jnp.float32)
    state = memory.apply(params, written, state, jnp.ones((2, 3), bool), method="write")
    np.testing.assert_array_equal(memory.apply(params, state, method="rows"), written)
    again = state._replace(is_start=jnp.array([True, False]))
    again = begin_rows(again, memory.apply(params, method="start_state"), memory.state_axes())
    np.testing.assert_array_equal(memory.apply(params, again, method="rows")[0], params["params"]["start"])


def test_it_cannot_be_read_like_a_bank():
    with pytest.raises(ValueError, match=r"join 'gate' .* got 'tokens', which cannot"):
        ModelConfig(memory=TokensConfig(), join=GateJoin())


def test_the_state_is_the_memory_tokens_alone():
    model = lm2_jax.build_model(lm2_jax.preset("rmt_tiny").model)
    state = model.init_state(5)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(5, 3, 32), (5,)]
