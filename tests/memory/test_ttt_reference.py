"""The token-by-token reference, by numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax.ops.ttt_chunk import ref


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def scalar_memory(chunk_tokens: int, valid: tuple[bool, ...] = (True, True)):
    """f(x) = w x with w = 1, s = 2; two tokens k = 1, v = 3, q = 10, theta = 1/4, e = 1/2, a = 3/4."""
    tokens = {name: jnp.full((2, 1), value) for name, value in (("k", 1.0), ("v", 3.0), ("q", 10.0))}
    tokens |= {name: jnp.full(2, value) for name, value in (("theta", 0.25), ("e", 0.5), ("a", 0.75))}
    tokens["valid"] = jnp.asarray(valid)
    y, (w,), (s,) = ref.token_loop(ref.linear, [jnp.ones((1, 1))], [jnp.full((1, 1), 2.0)], None, tokens, chunk_tokens)
    return y[:, 0].tolist(), w.item(), s.item()


def test_chunks_of_one_token():
    """u_1 = 2 (1 - 3) = -4: s = 1 + 1 = 2, w = 3/4 + 2 = 2.75. u_2 = -1/2: s = 1 + 1/8, w = 2.0625 + 1.125."""
    assert scalar_memory(1) == ([27.5, 31.875], 3.1875, 1.125)


def test_a_chunk_of_two_tokens_takes_both_gradients_at_its_start():
    """u_2 = u_1 = -4: s = 1 + 1 = 2, w = 2.0625 + 2."""
    assert scalar_memory(2) == ([27.5, 40.625], 4.0625, 2.0)


def test_a_token_that_is_not_valid_changes_nothing():
    assert scalar_memory(1, valid=(False, True)) == ([10.0, 27.5], 2.75, 2.0)
    assert scalar_memory(1, valid=(False, False)) == ([10.0, 10.0], 1.0, 2.0)


def test_the_mlp():
    """gelu(0) = 0, gelu(100) = 100. Outputs 0 and 400: mean 200, deviation 200 but for the epsilon of 1."""
    weights = [jnp.asarray([[100.0, 0.0], [0.0, 0.0]]), jnp.asarray([[4.0, 0.0], [0.0, 0.0]])]
    norm = jnp.asarray([3.0, 5.0]), jnp.asarray([0.5, -0.5])
    y = ref.mlp(weights, jnp.asarray([1.0, 7.0]), norm)
    np.testing.assert_allclose(y, [1 + 3 + 0.5, 7 - 5 - 0.5], rtol=1e-4)
