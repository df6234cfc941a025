"""Names and layouts of a decoder's parameters: Hugging Face's, and the canonical ones of `lm2_jax.params`.

Hugging Face stores a matrix as [outputs, inputs], with heads merged; here a kernel is [inputs, outputs], with an axis
for heads. Both pair dimension i of a head with i + K/2 in the rotary embedding.
"""

import re
from collections.abc import Callable

import numpy as np

from lm2_jax.decoder import DecoderConfig

_TOP = {
    "embed/table": "model.embed_tokens.weight",
    "positions/table": "model.embed_positions.weight",
    "final_norm/scale": "model.norm.weight",
    "final_norm/b": "model.norm.bias",
    "head/w": "lm_head.weight",
}
_LAYER = {
    "attention_norm/scale": "input_layernorm.weight",
    "attention_norm/b": "input_layernorm.bias",
    "attention/q_proj/w": "self_attn.q_proj.weight",
    "attention/k_proj/w": "self_attn.k_proj.weight",
    "attention/v_proj/w": "self_attn.v_proj.weight",
    "attention/o_proj/w": "self_attn.o_proj.weight",
    "attention/q_proj/b": "self_attn.q_proj.bias",
    "attention/k_proj/b": "self_attn.k_proj.bias",
    "attention/v_proj/b": "self_attn.v_proj.bias",
    "attention/o_proj/b": "self_attn.o_proj.bias",
    "attention/q_norm/scale": "self_attn.q_norm.weight",
    "attention/k_norm/scale": "self_attn.k_norm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/b": "post_attention_layernorm.bias",
    "mlp/gated/w": "mlp.gate_proj.weight",
    "mlp/up/w": "mlp.up_proj.weight",
    "mlp/down/w": "mlp.down_proj.weight",
    "mlp/up/b": "mlp.up_proj.bias",
    "mlp/down/b": "mlp.down_proj.bias",
}
_CANONICAL_LAYER = re.compile(r"layers/(\d+)/(.+)")

Shapes = dict[str, tuple[int, ...]]


def hf_name(canonical: str) -> str | None:
    """Hugging Face's name of a parameter; None for one that a decoder does not have, such as a memory's."""
    match = _CANONICAL_LAYER.fullmatch(canonical)
    if match is None:
        return _TOP.get(canonical)
    name = _LAYER.get(match[2])
    return None if name is None else f"model.layers.{match[1]}.{name}"


def hf_shapes(decoder: DecoderConfig, vocab_size: int) -> Shapes:
    """The shapes of all tensors of a Hugging Face checkpoint, by name."""
    d = decoder
    D, F, heads, kv_heads = d.width, d.mlp_width, d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    layer = {
        "attention_norm/scale": (D,),
        "attention/q_proj/w": (heads, D),
        "attention/k_proj/w": (kv_heads, D),
        "attention/v_proj/w": (kv_heads, D),
        "attention/o_proj/w": (D, heads),
        "mlp_norm/scale": (D,),
        "mlp/up/w": (F, D),
        "mlp/down/w": (D, F),
    }
    if d.mlp == "swiglu":
        layer["mlp/gated/w"] = (F, D)
    else:
        layer |= {"mlp/up/b": (F,), "mlp/down/b": (D,)}
    if d.norm == "layer":
        layer |= {"attention_norm/b": (D,), "mlp_norm/b": (D,)}
    if d.attention_bias != "none":
        layer |= {"attention/q_proj/b": (heads,), "attention/k_proj/b": (kv_heads,), "attention/v_proj/b": (kv_heads,)}
    if d.attention_bias == "qkvo":
        layer["attention/o_proj/b"] = (D,)
    if d.qk_norm:
        layer |= {"attention/q_norm/scale": (d.head_dim,), "attention/k_norm/scale": (d.head_dim,)}
    shapes: Shapes = {_TOP["embed/table"]: (vocab_size, D)}
    if d.max_positions is not None:
        shapes[_TOP["positions/table"]] = (d.max_positions, D)
    for index in range(d.num_layers):
        shapes |= {f"model.layers.{index}.{_LAYER[name]}": shape for name, shape in layer.items()}
    shapes[_TOP["final_norm/scale"]] = (D,)
    if d.norm == "layer":
        shapes[_TOP["final_norm/b"]] = (D,)
    if not d.tie_head:
        shapes[_TOP["head/w"]] = (vocab_size, D)
    return shapes


def is_transposed(canonical: str) -> bool:
    """Whether the two layouts differ: kernels do, norms and the embedding do not."""
    return canonical.endswith("/w")


def from_hf(canonical: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Hugging Face's array as a parameter of this shape; a view where possible."""
    return array.T.reshape(shape) if is_transposed(canonical) else array.reshape(shape)


def to_hf(canonical: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `from_hf`; `shape` is Hugging Face's."""
    return array.reshape(shape[::-1]).T if is_transposed(canonical) else array.reshape(shape)


def halves_from_pairs(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as Hugging Face orders them, from files that rotate the pairs (2i, 2i + 1).

    Args:
      matrix: [heads * K, inputs], or a bias [heads * K].
      heads: number of heads.
    """
    rows = len(matrix)
    return matrix.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def pair_reader(read: Callable[[str], np.ndarray], decoder: DecoderConfig) -> Callable[[str], np.ndarray]:
    """A reader by Hugging Face's names whose q and k have their rows in Hugging Face's order."""

    def ordered(name: str) -> np.ndarray:
        array = read(name)
        heads = {"q_proj": decoder.num_heads, "k_proj": decoder.num_kv_heads}.get(name.split(".")[-2])
        return array if heads is None else halves_from_pairs(array, heads)

    return ordered
