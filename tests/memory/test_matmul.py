"""Products whose derivatives need no transposes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm2_jax.ops.ttt_chunk.matmul import matmul_nn, matmul_nt, matmul_tn

PRODUCTS = [  # ours, the same in jax.numpy, shapes of the factors
    (matmul_nn, lambda a, b: a @ b, (3, 4), (4, 5)),
    (matmul_nt, lambda a, b: a @ b.T, (3, 4), (5, 4)),
    (matmul_tn, lambda a, b: a.T @ b, (4, 3), (4, 5)),
]


@pytest.mark.parametrize(("ours", "plain", "of_a", "of_b"), PRODUCTS)
def test_products_and_their_first_and_second_derivatives(ours, plain, of_a, of_b):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (of_a, of_b))

    def first(product):
        return jax.grad(lambda a, b: jnp.sum(jnp.tanh(product(a, b))), argnums=(0, 1))(a, b)

    def second(product):
        grad = jax.grad(lambda a, b: jnp.sum(jnp.tanh(product(a, b))), argnums=(0, 1))
        return jax.grad(lambda a, b: sum(jnp.sum(g**3) for g in grad(a, b)), argnums=(0, 1))(a, b)

    for of in (first, second, lambda product: product(a, b)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), of(ours), of(plain))


@pytest.mark.parametrize(("ours", "plain", "of_a", "of_b"), PRODUCTS)
def test_no_derivative_is_transposed(ours, plain, of_a, of_b):
    a, b = jnp.ones(of_a), jnp.ones(of_b)

    def both(product):
        grad = jax.grad(lambda a, b: jnp.sum(jnp.tanh(product(a, b))), argnums=(0, 1))
        again = jax.grad(lambda a, b: sum(jnp.sum(g**3) for g in grad(a, b)), argnums=(0, 1))
        return str(jax.make_jaxpr(again)(a, b))

    assert "transpose[" in both(plain)
    assert "transpose[" not in both(ours)
