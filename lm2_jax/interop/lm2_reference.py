"""LM2's memory as its authors released it, for parity and import only: it is neither a preset nor a join.

The released module (github.com/convergence-ai/lm2, commit 5f56b19) differs from the paper's equations 1-6: its
candidate and gates are those of a relational memory core (arXiv:1806.01822). It needs as many tokens T in a call as
slots N, slots as wide as the model, and a bank for each row. Its gates see the mean of all tokens of a call, so it is
not causal inside a call. Our banks (`lm2_jax.memory.gated_bank`) are causal and have none of these limits;
docs/parity.md compares them.

N is the number of slots, of tokens, and the width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm2_jax.errors import UserError
from lm2_jax.types import Array, Float, Int

_EPSILON = 1e-5  # of layer norms
MODULE = "mem_attn.memory_module"  # the module's name in a layer of the released model


class Affine(NamedTuple):
    """x W + b, or the scale W and shift b of a layer norm."""

    w: Float[Array, "*N M"]
    b: Float[Array, " M"]


class ReferenceWeights(NamedTuple):
    """The parameters of one layer's memory, kernels as [inputs outputs]."""

    q: Affine
    k: Affine
    v: Affine
    mlp: Affine
    """Of both layers of the candidate's MLP: they share their weights."""
    norm_read: Affine
    norm_mlp: Affine
    token_scale: Float[Array, " N"]
    token_gate: Affine
    slot_gate: Affine
    input_bias: Float[Array, ""]
    forget_bias: Float[Array, ""]


# Our field -> the names of weight and bias in the released module.
_AFFINES = {
    "q": "query_proj",
    "k": "key_proj",
    "v": "value_proj",
    "mlp": "attention_mlp.0",
    "norm_read": "attended_memory_layernorm",
    "norm_mlp": "attended_memory_layernorm2",
    "token_gate": "input_gate_projector.linear",
    "slot_gate": "memory_gate_projector.linear",
}
_OTHERS = {"token_scale": "input_gate_projector.w", "input_bias": "input_bias", "forget_bias": "forget_bias"}


def reference_weights(read: Callable[[str], np.ndarray], prefix: str = "") -> ReferenceWeights:
    """The parameters of a memory in the state dict of the released model.

    Args:
      read: gives an array by its name; as of a `SafetensorsFile` of the state dict. Pickles are not read.
      prefix: what precedes the module's own names, such as `model.layers.0.mem_attn.memory_module.`.
    Raises:
      UserError: a parameter is missing.
    """

    def array(name: str) -> Array:
        try:
            return jnp.asarray(read(prefix + name), jnp.float32)
        except KeyError as error:
            raise UserError(f"no parameter {prefix + name!r}: expected those of LM2's released module") from error

    fields: dict[str, Any] = {}
    for field, name in _AFFINES.items():  # a layer norm's scale has one axis, which .T leaves as it is
        fields[field] = Affine(array(f"{name}.weight").T, array(f"{name}.bias"))
    for field, name in _OTHERS.items():
        fields[field] = array(name)
    return ReferenceWeights(**fields)


def start_bank(rows: int, slots: int) -> Float[Array, "B N N"]:
    """The bank before any text: the identity, for each row."""
    return jnp.broadcast_to(jnp.eye(slots), (rows, slots, slots))


def reference_memory(
    weights: ReferenceWeights,
    x_BNN: Float[Array, "B T D"],
    bank_BNN: Float[Array, "B N N"],
    heads: int,
    top_k: int | None = None,
) -> tuple[Float[Array, "B N N"], Float[Array, "B N N"]]:
    """One layer's memory over the N tokens of a call.

        A = softmax(q k^T / sqrt(N / heads)) over the slots j <= t,  R = A v
        C = LN(M + R),  C' = LN(C + relu(L relu(L C)))
        (i, f) = sigmoid(G tanh(M) + H mean_t relu(w * x_t) + (b_i, b_f))
        M' = i * tanh(C') + f * M,  y_t = x_t + M'_t

    (released code of arXiv:2502.06049, without its dropout of attention weights.) In the released model the bank that a
    layer returns is the next layer's, and the last layer's is the first one's at the next call.

    Args:
      weights: of the layer.
      x_BNN: output of the layer's attention.
      bank_BNN: the bank.
      heads: number of heads of the read.
      top_k: keeps each token's largest weights only, without normalising them again; None: all.
    Returns:
      What the layer adds to its residual stream, and the bank after it.
    Raises:
      ValueError: numbers of tokens, slots and width differ.
    """
    B, N, _ = bank_BNN.shape
    if x_BNN.shape != (B, N, N):
        raise ValueError(f"tokens, slots and width must be equal, got x {x_BNN.shape} and a bank {bank_BNN.shape}")
    read_BNN = _read(weights, x_BNN, bank_BNN, heads, top_k)
    candidate_BNN = _layer_norm(bank_BNN + read_BNN, weights.norm_read)
    hidden_BNN = jax.nn.relu(_affine(candidate_BNN, weights.mlp))
    hidden_BNN = jax.nn.relu(_affine(hidden_BNN, weights.mlp))
    candidate_BNN = _layer_norm(candidate_BNN + hidden_BNN, weights.norm_mlp)
    seen_BN = jnp.mean(jax.nn.relu(weights.token_scale[None, None] * x_BNN), axis=1)
    gates_BNM = _affine(jnp.tanh(bank_BNN), weights.slot_gate) + _affine(seen_BN, weights.token_gate)[:, None]
    input_BNN, forget_BNN = jnp.split(gates_BNM, 2, axis=-1)
    input_BNN = jax.nn.sigmoid(input_BNN + weights.input_bias)
    forget_BNN = jax.nn.sigmoid(forget_BNN + weights.forget_bias)
    bank_BNN = input_BNN * jnp.tanh(candidate_BNN) + forget_BNN * bank_BNN
    return x_BNN + bank_BNN, bank_BNN


def _read(weights: ReferenceWeights, x_BNN: Array, bank_BNN: Array, heads: int, top_k: int | None) -> Array:
    """What each token finds in the slots up to its own number."""
    B, N, _ = bank_BNN.shape

    def split(z_BNN: Array) -> Float[Array, "B N H K"]:
        return z_BNN.reshape(B, N, heads, N // heads)

    q_BNHK = split(_affine(x_BNN, weights.q))
    k_BNHK, v_BNHK = split(_affine(bank_BNN, weights.k)), split(_affine(bank_BNN, weights.v))
    scores_BHTN = jnp.einsum("bthk,bnhk->bhtn", q_BNHK, k_BNHK, precision="highest") * (N // heads) ** -0.5
    is_seen_TN = jnp.tril(jnp.ones((N, N), bool))
    a_BHTN = jax.nn.softmax(jnp.where(is_seen_TN[None, None], scores_BHTN, -jnp.inf), axis=-1)
    if top_k is not None:
        slots_BHTk: Int[Array, "B H T k"] = jax.lax.top_k(a_BHTN, top_k)[1]
        kept_BHTN = jax.nn.one_hot(slots_BHTk, N).sum(axis=-2)
        a_BHTN = a_BHTN * kept_BHTN
    return jnp.einsum("bhtn,bnhk->bthk", a_BHTN, v_BNHK, precision="highest").reshape(B, N, N)


def _affine(x: Array, p: Affine) -> Array:
    return jnp.einsum("...n,nm->...m", x, p.w, precision="highest") + jnp.expand_dims(p.b, tuple(range(x.ndim - 1)))


def _layer_norm(x_BNN: Array, p: Affine) -> Array:
    centered = x_BNN - jnp.mean(x_BNN, axis=-1, keepdims=True)
    unit = centered * jax.lax.rsqrt(jnp.mean(centered * centered, axis=-1, keepdims=True) + _EPSILON)
    return unit * p.w[None, None] + p.b[None, None]
