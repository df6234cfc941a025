"""Checkpoints of the released RMT and ARMT: a state dict as safetensors, and the config.json of their decoder.

The released code (booydar/recurrent-memory-transformer, RodkinIvan/associative-recurrent-memory-transformer) puts the
decoder into a `memory_cell`, and ARMT each of its layers into a `layer`. Sizes that no tensor shows are theirs: three
products in ARMT's feature map, and one rate per token.
"""

import pathlib
import re

import numpy as np

from lm2_jax.blocks.base import JoinConfig
from lm2_jax.blocks.layer_tokens import LayerTokensJoin
from lm2_jax.blocks.tokens import TokensJoin
from lm2_jax.errors import UserError
from lm2_jax.interop.hf_folder import HfFolder
from lm2_jax.interop.names import Shapes, hf_name
from lm2_jax.memory.associative import AssociativeConfig
from lm2_jax.memory.base import MemoryConfig
from lm2_jax.memory.tokens import TokensConfig

CELL = "memory_cell."
_START = f"{CELL}memory"
_POSITIONS = "model.embed_positions.weight"
_LAYER = "model.layers.{}."
# Of ARMT: our name in a layer -> theirs.
_MEMORY = {
    "memory/q/w": "W_mq.weight",
    "memory/k/w": "W_mk.weight",
    "memory/v/w": "W_mv.weight",
    "memory/gate_rate": "W_mb.weight",
    "memory/rate_bias/b": "W_mb.bias",
}


class RecurrentFolder(HfFolder):
    """A folder whose state dict is that of a `RecurrentWrapper` or an `AssociativeRecurrentWrapper`.

    Tensors have the decoder's names of Hugging Face here, and memories `memory` and `model.layers.0.W_mq.weight`.
    """

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        self.memory = self._memory()
        self._check_positions()

    def plain_name(self, raw: str) -> str:
        """Without the wrappers; the memory is `memory`, and in a layer of ARMT `model.layers.0.W_mq.weight`."""
        name = raw.removeprefix(CELL).removeprefix("model.") if raw != _START else "memory"
        name = re.sub(r"^(model\.layers\.\d+\.|transformer\.h\.\d+\.)layer\.", r"\1", name)
        return re.sub(r"^transformer\.h\.(\d+)\.(?=W_m)", r"model.layers.\1.", name)

    def _memory(self) -> tuple[MemoryConfig, JoinConfig]:
        shapes = self.shapes()
        if "memory" not in shapes:
            raise UserError(
                f"{self.where}: no tensor {_START!r}: a wrapper of RMT or ARMT without memory tokens; save its decoder "
                "alone, without the prefix 'memory_cell.model.'",
                status=1,
            )
        tokens, query = shapes["memory"][0], _LAYER.format(0) + _MEMORY["memory/q/w"]
        if query not in shapes:
            return TokensConfig(num_tokens=tokens), TokensJoin()
        return AssociativeConfig(num_tokens=tokens, key_width=shapes[query][0]), LayerTokensJoin()

    @property
    def _own_positions(self) -> bool:
        """Whether memory tokens have learned positions of their own, after the decoder's: ARMT around a GPT-2."""
        return isinstance(self.memory and self.memory[0], AssociativeConfig) and _POSITIONS in self._places

    def _check_positions(self) -> None:
        if not self._own_positions:
            return
        assert self.memory is not None
        rows, most = super().shapes()[_POSITIONS][0], self.spec.decoder.max_positions
        if rows != (most or 0) + self.memory[0].stack_tokens:
            raise UserError(
                f"{self.where}: its {rows} learned positions are not the {most} of n_positions and one for each of "
                f"{self.memory[0].stack_tokens} memory tokens; an ARMT around a GPT-2 is supported with wrap_pos=True",
                status=1,
            )

    def shapes(self) -> Shapes:
        """See the base class."""
        found = super().shapes()
        if self._own_positions:
            found[_POSITIONS] = (self.spec.decoder.max_positions or 0, *found[_POSITIONS][1:])
        return found

    def read(self, name: str) -> np.ndarray:
        """See the base class; positions of memory tokens are a part of them here."""
        array, most = super().read(name), self.spec.decoder.max_positions
        if self._own_positions and name == _POSITIONS:
            return array[:most]
        return array + super().read(_POSITIONS)[most:] if self._own_positions and name == "memory" else array

    def memory_shapes(self) -> Shapes:
        """See the base class."""
        assert self.memory is not None
        memory, _ = self.memory
        D = self.spec.decoder.width
        if not isinstance(memory, AssociativeConfig):
            return {"memory": (memory.stack_tokens, D)}
        per_layer = {
            "memory/q/w": (memory.key_width, D),
            "memory/k/w": (memory.key_width, D),
            "memory/v/w": (D, D),
            "memory/gate_rate": (1, D),
            "memory/rate_bias/b": (1,),
        }
        layers = range(self.spec.decoder.num_layers)
        named = {_LAYER.format(i) + _MEMORY[name]: shape for i in layers for name, shape in per_layer.items()}
        return {"memory": (memory.num_tokens, D), **named}

    def name_of(self, canonical: str) -> str | None:
        """See the base class."""
        if canonical in ("carrier/memory/start", "carrier/start"):
            return "memory"
        match = re.fullmatch(r"layers/(\d+)/(.+)", canonical)
        if match and match[2] in _MEMORY:
            return _LAYER.format(match[1]) + _MEMORY[match[2]]
        return hf_name(canonical)


def open_folder(path: pathlib.Path) -> HfFolder:
    """A folder of a decoder, or of one with a released RMT or ARMT around it.

    Raises:
      UserError: as `HfFolder`.
    """
    opened = HfFolder(path)
    return RecurrentFolder(path) if any(name.startswith(CELL) for name in opened.shapes()) else opened
