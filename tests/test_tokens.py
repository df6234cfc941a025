import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lm2_jax
from lm2_jax.memory.tokens import TokensConfig
from lm2_jax.precision import Precision


def make(num_tokens: int = 3, width: int = 256):
    memory = TokensConfig(num_tokens).build(width, Precision())
    state = memory.init_state(2)
    return memory, state, nn.unbox(memory.init(jax.random.key(0), state, method="rows"))


def test_the_start_has_the_scale_of_the_embedding():
    memory, state, params = make(num_tokens=40)
    rows = memory.apply(params, state, method="rows")
    assert rows.shape == (2, 40, 256)
    assert float(rows.std()) == pytest.approx(1 / 16, rel=0.05)
    np.testing.assert_array_equal(rows[0], rows[1])


def test_what_was_written_is_what_stands_there_next():
    memory, state, params = make()
    written = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 256)), jnp.float32)
    state = memory.apply(params, written, state, jnp.ones((2, 3), bool), method="write")
    assert not state.fresh.any()
    np.testing.assert_array_equal(memory.apply(params, state, method="rows"), written)
    again = state._replace(fresh=jnp.array([True, False]))
    np.testing.assert_array_equal(memory.apply(params, again, method="rows")[0], params["params"]["start"])


def test_it_cannot_be_read_like_a_bank():
    memory, state, params = make()
    with pytest.raises(ValueError, match="join 'tokens'"):
        memory.apply(params, jnp.zeros((2, 4, 256)), state, method="read")


def test_the_state_is_the_memory_tokens_alone():
    model = lm2_jax.build_model(lm2_jax.preset("rmt_tiny").model)
    state = model.init_state(5)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(5, 3, 32), (5,)]
