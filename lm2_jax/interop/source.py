"""What a checkpoint of another project gives: a decoder's sizes, its tensors by name, and its tokenizer."""

import abc
from typing import NamedTuple

import numpy as np

from lm2_jax.blocks.base import JoinConfig
from lm2_jax.errors import UserError
from lm2_jax.interop.hf_config import DecoderSpec
from lm2_jax.interop.names import Shapes, hf_name, hf_shapes
from lm2_jax.memory.base import MemoryConfig


class TokenizerFiles(NamedTuple):
    """The tokenizer of a checkpoint."""

    kind: str  # of `TokenizerConfig`
    content: bytes  # of tokenizer.json or tokenizer.model
    eos: str | None  # name of the token that ends a text; None: as the file says
    more: dict[str, bytes]  # other files, such as the one with the chat template, by name


class Source(abc.ABC):
    """A checkpoint, open for reading. Names and layouts of its tensors are Hugging Face's."""

    where: str  # for messages and model cards
    spec: DecoderSpec
    memory: tuple[MemoryConfig, JoinConfig] | None = None  # that the checkpoint was trained with

    @abc.abstractmethod
    def shapes(self) -> Shapes:
        """The shape of each tensor that the files hold."""

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One tensor, [outputs, inputs] where it is a matrix."""

    @abc.abstractmethod
    def tokenizer(self) -> TokenizerFiles | None:
        """The tokenizer, or None where the checkpoint has none."""

    def name_of(self, canonical: str) -> str | None:
        """The tensor that holds a parameter, by its canonical name; None: no tensor does."""
        return hf_name(canonical)

    def memory_shapes(self) -> Shapes:
        """The shapes of the memory's tensors."""
        return {}

    def check(self) -> None:
        """Compares the tensors with what the config says, before any of them is read.

        Raises:
          UserError: a tensor is missing, has another shape, or would not be used.
        """
        wanted = {**hf_shapes(self.spec.decoder, self.spec.vocab_size), **self.memory_shapes()}
        found = self.shapes()
        problems = [f"{name}: missing" for name in wanted if name not in found]
        problems += [
            f"{name}: expected shape {list(shape)} as the config says, got {list(found[name])}"
            for name, shape in wanted.items()
            if name in found and tuple(found[name]) != shape
        ]
        problems += [f"{name}: the decoder has no such parameter" for name in found if name not in wanted]
        if problems:
            more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
            raise UserError(
                f"{self.where}: the tensors do not fit its config:\n  " + "\n  ".join(problems[:8] + more),
                status=1,
            )
