"""Matrix products whose derivatives come out in the order of what they are derivatives of.

The derivatives of a b, a b^T and a^T b are such products again. JAX's own rule finds one of the two as its transpose
and turns it round, and where a backend does not fold that into the product, all that uses the derivative reads it
across its rows: on a CPU that took longer than the product. As rules of their own the three serve any order of
derivatives, but only those taken backwards.
"""

import jax

from lm2_jax.types import Array, Float


def _contract(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())))


@jax.custom_vjp
def times(a_MK: Float[Array, "M K"], b_KN: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """a b."""
    return _contract(a_MK, b_KN, 1, 0)


@jax.custom_vjp
def times_t(a_MK: Float[Array, "M K"], b_NK: Float[Array, "N K"]) -> Float[Array, "M N"]:
    """a b^T."""
    return _contract(a_MK, b_NK, 1, 1)


@jax.custom_vjp
def t_times(a_KM: Float[Array, "K M"], b_KN: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """a^T b."""
    return _contract(a_KM, b_KN, 0, 0)


times.defvjp(lambda a, b: (times(a, b), (a, b)), lambda ab, dy: (times_t(dy, ab[1]), t_times(ab[0], dy)))
times_t.defvjp(lambda a, b: (times_t(a, b), (a, b)), lambda ab, dy: (times(dy, ab[1]), t_times(dy, ab[0])))
t_times.defvjp(lambda a, b: (t_times(a, b), (a, b)), lambda ab, dy: (times_t(ab[1], dy), times(ab[0], dy)))
