"""llama2.c's `.bin` files (https://github.com/karpathy/llama2.c, the format of its `run.c`), and its tokenizers."""

import math
import pathlib
import struct

import numpy as np

from lm2_jax.decoder import DecoderConfig
from lm2_jax.errors import UserError
from lm2_jax.interop.hf_config import DecoderSpec
from lm2_jax.interop.names import Shapes, hf_shapes, pair_reader
from lm2_jax.interop.sentencepiece_model import Piece, build_sentencepiece
from lm2_jax.interop.source import Source, TokenizerFiles

_HEADER = struct.Struct("<7i")
_BOS, _EOS = 1, 2  # as llama2.c's tokenizers number them
# The order of the matrices in a file; those of a layer are stored for all layers together.
_LAYERS_FIRST = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LAYERS_SECOND = ("post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")


class Llama2cFile(Source):
    """A checkpoint of llama2.c.

    Args:
      path: of the `.bin` file.
      tokenizer: file of the tokenizer; None: `tokenizer.bin` or `tok<vocabulary>.bin` next to it, if there is one.
    Raises:
      UserError: a file that is damaged or has another format.
    """

    def __init__(self, path: pathlib.Path, tokenizer: pathlib.Path | None = None):
        self.where, self.path = str(path), path
        with open(path, "rb") as file:
            head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            raise UserError(f"{path}: truncated: no llama2.c file has {len(head)} bytes", status=1)
        D, F, L, H, G, vocabulary, longest = _HEADER.unpack(head)
        if min(D, F, L, H, G, longest) < 1 or vocabulary == 0 or max(D, F, L, H, G, longest) > 2**24 or D % H:
            raise UserError(
                f"{path}: not a llama2.c file of its first format: its header reads {_HEADER.unpack(head)}. Pickles of "
                "PyTorch end in .bin too; convert those to safetensors",
                status=1,
            )
        # A negative vocabulary means an untied head.
        decoder = DecoderConfig(D, L, H, G, None, F, tie_head=vocabulary > 0)
        self.spec = DecoderSpec(decoder, abs(vocabulary), longest, _EOS)
        self._places = self._layout(longest * (D // H))
        self._tokenizer = tokenizer or next(
            (path.parent / n for n in ("tokenizer.bin", f"tok{abs(vocabulary)}.bin") if (path.parent / n).exists()),
            None,
        )
        self._read = pair_reader(self._read_raw, decoder)

    def _layout(self, rotary: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """The first byte and the shape of each tensor; `rotary` numbers of a table stand before an untied head."""
        shapes = hf_shapes(self.spec.decoder, self.spec.vocab_size)
        layers = range(self.spec.decoder.num_layers)

        def of_layers(kinds: tuple[str, ...]) -> list[str]:
            return [f"model.layers.{layer}.{kind}.weight" for kind in kinds for layer in layers]

        order = [
            "model.embed_tokens.weight",
            *of_layers(_LAYERS_FIRST),
            *of_layers(_LAYERS_SECOND),
            "model.norm.weight",
        ]
        at, places = _HEADER.size, {}
        for name in order:
            places[name] = (at, shapes[name])
            at += 4 * math.prod(shapes[name])
        at += 4 * rotary
        if not self.spec.decoder.tie_head:
            places["lm_head.weight"] = (at, shapes["lm_head.weight"])
            at += 4 * math.prod(shapes["lm_head.weight"])
        size = self.path.stat().st_size
        if size != at:
            raise UserError(f"{self.path}: truncated or of another format: expected {at} bytes, found {size}", status=1)
        return places

    def shapes(self) -> Shapes:
        """See the base class."""
        return {name: shape for name, (_, shape) in self._places.items()}

    def read(self, name: str) -> np.ndarray:
        """See the base class."""
        return self._read(name)

    def _read_raw(self, name: str) -> np.ndarray:
        at, shape = self._places[name]
        return np.fromfile(self.path, "<f4", math.prod(shape), offset=at).reshape(shape)

    def tokenizer(self) -> TokenizerFiles | None:
        """The pieces as a SentencePiece model, which they come from."""
        if self._tokenizer is None:
            return None
        pieces = read_pieces(self._tokenizer, self.spec.vocab_size)
        return TokenizerFiles("sentencepiece", build_sentencepiece(pieces), None, {})


def read_pieces(path: pathlib.Path, vocab_size: int) -> list[Piece]:
    """The pieces of a llama2.c tokenizer: an int32, then per piece a float32 score, a length and the bytes."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", status=1) from error
    pieces, at = [], 4
    try:
        while at < len(content):
            score, length = struct.unpack_from("<fi", content, at)
            text = content[at + 8 : at + 8 + length]
            if length < 0 or len(text) != length:
                raise UserError(f"{path}: truncated at piece {len(pieces)}", status=1)
            pieces.append(_piece(len(pieces), text.decode("utf-8"), score))
            at += 8 + length
    except (struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a llama2.c tokenizer, or damaged ({error})", status=1) from error
    if len(pieces) != vocab_size:
        raise UserError(f"{path}: {len(pieces)} pieces, but the model has a vocabulary of {vocab_size}", status=1)
    return pieces


def _piece(index: int, text: str, score: float) -> Piece:
    """The first three are <unk>, <s> and </s>, which the file writes in its own way."""
    special = {0: ("<unk>", "unknown"), _BOS: ("<s>", "control"), _EOS: ("</s>", "control")}
    if index in special:
        return Piece(special[index][0], 0.0, special[index][1])
    if text.startswith("<0x") and text.endswith(">"):
        return Piece(text, score, "byte")
    return Piece(text.replace(" ", "\u2581"), score, "normal")
