"""Tokenizers of the SentencePiece library."""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from lm2_jax.data.files import read_bytes
from lm2_jax.data.tokenizer_base import (
    ANSWER,
    BLANKS,
    CONTROL_NAMES,
    FileTokenizer,
    TokenizerConfig,
    TokenizerKind,
    special_id,
)
from lm2_jax.errors import UserError

if TYPE_CHECKING:
    import sentencepiece


class SentencePieceTokenizer(FileTokenizer):
    """Wraps a SentencePiece model.

    Args:
      model: content of the .model file.
      config: names of the special tokens, and the path for messages.
    Raises:
      UserError: a damaged file, or no token that ends a document.
    """

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, config: TokenizerConfig):
        super().__init__(config)
        inner, self._model = _load(model, config), model
        self.vocab_size = inner.vocab_size()

        def find(name: str) -> int | None:
            index = inner.piece_to_id(name)
            return index if inner.id_to_piece(index) == name else None  # an unknown piece gives the id of <unk>

        # The model itself names these ids; -1 means none.
        eos = inner.eos_id() if config.eos is None else special_id(find, config.eos, (), "eos", config)
        pad = inner.pad_id() if config.pad is None else special_id(find, config.pad, (), "pad", config)
        if eos is None or eos < 0:
            raise UserError(
                f"data.tokenizer: {config.path} marks no token that ends a document; "
                "set data.tokenizer.eos to the piece to use"
            )
        self.eos_id, self.pad_id = eos, eos if pad is None or pad < 0 else pad
        self.answer_id = find(ANSWER)
        known = {i for i in map(find, CONTROL_NAMES) if i is not None}
        self._reserved = known | {self.eos_id, self.pad_id}
        as_text = [i for i in self._reserved if not (inner.is_control(i) or inner.is_unknown(i))]
        self._inner = _load(_as_control(model, as_text), config) if as_text else inner
        self._writes_blank = (self._inner.encode("a", out_type=str) or [""])[0].startswith(BLANKS)

    def _encode(self, text: str) -> list[int]:
        return self._inner.encode(text.removeprefix(" ") if self._writes_blank else text)

    def decode(self, ids: list[int]) -> str:
        return self._inner.decode([int(i) for i in ids if 0 <= i < self.vocab_size and i not in self._reserved])

    def serialized(self) -> bytes:
        return self._model

    def vocabulary(self) -> dict[str, int]:
        return {self._inner.id_to_piece(i): i for i in range(self.vocab_size)}

    def special_ids(self) -> dict[str, int]:
        return {self._inner.id_to_piece(token): token for token in self._reserved}

    def behaviour(self) -> bytes:
        return hashlib.sha256(self._model).digest()  # the file is kept byte for byte


def _load(model: bytes, config: TokenizerConfig) -> "sentencepiece.SentencePieceProcessor":
    import sentencepiece  # slow to import

    inner = sentencepiece.SentencePieceProcessor()
    try:
        inner.LoadFromSerializedProto(model)
        inner.decode(inner.encode("a b"))
    except Exception as error:
        raise UserError(f"data.tokenizer.path={config.path!r}: not a SentencePiece model: {error}", status=1) from error
    return inner


def _as_control(model: bytes, pieces: list[int]) -> bytes:
    """The model with these pieces as control pieces, which no text turns into."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # pyright: ignore[reportAttributeAccessIssue]
    for index in pieces:
        proto.pieces[index].type = proto.SentencePiece.CONTROL
    return proto.SerializeToString()


class SentencePieceFile(TokenizerKind):
    """A SentencePiece model file."""

    kind: ClassVar[str] = "sentencepiece"
    reads_file = True
    file_name = SentencePieceTokenizer.file_name

    @classmethod
    def build(cls, config: TokenizerConfig, corpus: Callable[[], list[str]], vocab_size: int) -> SentencePieceTokenizer:
        return cls.parse(read_bytes(config.path or ""), config)

    @classmethod
    def parse(cls, content: bytes, config: TokenizerConfig) -> SentencePieceTokenizer:
        return SentencePieceTokenizer(content, config)
