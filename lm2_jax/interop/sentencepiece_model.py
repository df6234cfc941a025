"""SentencePiece models from a list of pieces, as llama2.c and GGUF files store them."""

from typing import NamedTuple

TYPES = {"normal": 1, "unknown": 2, "control": 3, "user_defined": 4, "unused": 5, "byte": 6}


class Piece(NamedTuple):
    """One token."""

    text: str
    score: float
    kind: str  # a key of `TYPES`


def build_sentencepiece(pieces: list[Piece], add_blank: bool = True) -> bytes:
    """A BPE model whose token i is piece i.

    Args:
      pieces: all tokens, blanks written as U+2581.
      add_blank: whether a blank is put before a text.
    Returns:
      The content of a tokenizer.model.
    """
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf

    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    for piece in pieces:
        proto.pieces.add(piece=piece.text, score=piece.score, type=TYPES[piece.kind])
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.vocab_size = len(pieces)
    proto.trainer_spec.byte_fallback = any(piece.kind == "byte" for piece in pieces)
    names = {piece.text: index for index, piece in enumerate(pieces) if piece.kind in ("control", "unknown")}
    proto.trainer_spec.unk_id = names.get("<unk>", 0)
    proto.trainer_spec.bos_id = names.get("<s>", -1)
    proto.trainer_spec.eos_id = names.get("</s>", -1)
    proto.trainer_spec.pad_id = names.get("<pad>", -1)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = add_blank
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()
