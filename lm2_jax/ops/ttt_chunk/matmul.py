"""Matrix products of the inner loop: their precision, and derivatives that need no transposes.

All products run at `PRECISION`. By default a TPU rounds float32 operands to bfloat16 and a GPU to TF32. The inner loop
feeds its results back into its weights, so these errors grow with the length of the text (docs/design.md has figures).

The derivatives of a b, a b^T and a^T b are products of the same three kinds. JAX's own rule transposes one of the two
results instead; on a CPU this took longer than the product. The rules below support reverse mode only, of any order.
"""

import jax

from lm2_jax.types import Array, Float

PRECISION = jax.lax.Precision.HIGHEST


def contract(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Every matrix product of the inner loop: sums over `a_axis` of `a` and `b_axis` of `b`."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), precision=PRECISION)


@jax.custom_vjp
def matmul_nn(a_MK: Float[Array, "M K"], b_KN: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """a b."""
    return contract(a_MK, b_KN, 1, 0)


@jax.custom_vjp
def matmul_nt(a_MK: Float[Array, "M K"], b_NK: Float[Array, "N K"]) -> Float[Array, "M N"]:
    """a b^T."""
    return contract(a_MK, b_NK, 1, 1)


@jax.custom_vjp
def matmul_tn(a_KM: Float[Array, "K M"], b_KN: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """a^T b."""
    return contract(a_KM, b_KN, 0, 0)


matmul_nn.defvjp(lambda a, b: (matmul_nn(a, b), (a, b)), lambda ab, dy: (matmul_nt(dy, ab[1]), matmul_tn(ab[0], dy)))
matmul_nt.defvjp(lambda a, b: (matmul_nt(a, b), (a, b)), lambda ab, dy: (matmul_nn(dy, ab[1]), matmul_tn(dy, ab[0])))
matmul_tn.defvjp(lambda a, b: (matmul_tn(a, b), (a, b)), lambda ab, dy: (matmul_nt(ab[1], dy), matmul_nn(ab[0], dy)))
