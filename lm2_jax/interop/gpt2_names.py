"""GPT-2's tensors by the names that newer decoders have, and back.

GPT-2 stores kernels as [inputs, outputs], and those of queries, keys and values as one.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from lm2_jax.decoder import DecoderConfig
from lm2_jax.interop.names import Shapes

PREFIX = "transformer."  # of all names but the head's; some files leave it out
_TOP = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.embed_positions.weight": "transformer.wpe.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "model.norm.bias": "transformer.ln_f.bias",
    "lm_head.weight": "lm_head.weight",
}
_LAYER = {
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_PARTS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
_MASKS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")  # in old files; they follow from the config


class Place(NamedTuple):
    """Where a tensor is in a file of GPT-2."""

    name: str
    part: int | None = None  # which third of the outputs
    transposed: bool = False

    def read(self, array: np.ndarray) -> np.ndarray:
        """The tensor out of the file's."""
        array = array if self.part is None else np.split(array, 3, axis=-1)[self.part]
        return array.T if self.transposed else array

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor; the file's own where it cannot be divided."""
        if self.part is not None and shape and shape[-1] % 3 == 0:
            shape = (*shape[:-1], shape[-1] // 3)
        return shape[::-1] if self.transposed else shape


def places(decoder: DecoderConfig) -> dict[str, Place]:
    """The place of each tensor."""
    found = {name: Place(theirs) for name, theirs in _TOP.items()}
    for layer in range(decoder.num_layers):
        for module, theirs in _LAYER.items():
            part = _PARTS.get(module.split(".")[-1])
            for kind in ("weight", "bias"):
                place = Place(f"{PREFIX}h.{layer}.{theirs}.{kind}", part, "norm" not in module and kind == "weight")
                found[f"model.layers.{layer}.{module}.{kind}"] = place
    return found


def is_mask(name: str) -> bool:
    """Whether a tensor of a file is no parameter."""
    return _MASKS.fullmatch(name) is not None


def with_prefix(name: str) -> str:
    """A name of a file that may leave the prefix out."""
    return PREFIX + name if re.match(r"(wte|wpe|ln_f|h\.\d+)\.", name) else name


def in_files(
    places: Mapping[str, Place], shapes: Shapes, read: Callable[[str], np.ndarray]
) -> tuple[Shapes, Callable[[str], np.ndarray]]:
    """The tensors of files, from those by their common names.

    Args:
      places: of each tensor, where that is not its own name.
      shapes: of the tensors by their common names.
      read: gives one of these.
    Returns:
      Shapes of the files' tensors by their names, and what gives one of them.
    """
    tensors: dict[str, list[tuple[str, Place]]] = {}
    for name in shapes:
        place = places.get(name, Place(name))
        tensors.setdefault(place.name, []).append((name, place))

    def one(name: str) -> np.ndarray:
        parts = [read(own).T if place.transposed else read(own) for own, place in tensors[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    return {name: _file_shape(parts, shapes) for name, parts in tensors.items()}, one


def _file_shape(parts: list[tuple[str, Place]], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    name, place = parts[0]
    shape = shapes[name][::-1] if place.transposed else shapes[name]
    return (*shape[:-1], shape[-1] * len(parts))
