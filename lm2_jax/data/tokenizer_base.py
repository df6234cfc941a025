"""What a tokenizer is, how kinds of tokenizers register, and what holds for all of them."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np

from lm2_jax.data.files import clean_text
from lm2_jax.errors import UserError
from lm2_jax.registry import Family, near_misses

PAD, EOS, ANSWER = "<pad>", "<eos>", "<answer>"
SPECIALS = (PAD, EOS, ANSWER)
EOS_NAMES = (EOS, "</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
PAD_NAMES = (PAD, "<|padding|>", "<|pad|>", "<|finetune_right_pad_id|>", "[PAD]")
# Names that control a model in published vocabularies; no text turns into one of them.
CONTROL_NAMES = (*EOS_NAMES, *PAD_NAMES, ANSWER, "<s>", "<bos>", "<|begin_of_text|>", "<|im_start|>", "[CLS]", "[MASK]")
BLANKS = (" ", "\u2581")  # as they are, and as SentencePiece shows them
MOST_TOKENS = 10_000_000  # of a vocabulary; published ones have up to 300,000

_PIECE = 1 << 16  # characters that are encoded in one call; a call takes up to 200 bytes a character
_AROUND = 256  # characters on each side of a cut that are encoded to try it
# Before a blank and a letter; after a line or a sentence without blanks.
_CUTS = re.compile(r"(?<=[A-Za-z0-9.,;:!?)])(?= [A-Za-z])|(?<=\n)(?=[A-Za-z])|(?<=[。！？])(?=\w)")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens; `data.tokenizer` of a run."""

    kind: str = "bpe"
    """"bpe": a byte-level BPE trained on the source's text; "json": a `tokenizers` JSON file; "sentencepiece": a
    SentencePiece model file; "bytes": 256 bytes."""
    path: str | None = None
    """File of kind "json" or "sentencepiece"; the other kinds read none."""
    eos: str | None = None
    """Name of the token that ends a document; None: the first usual name that the vocabulary has."""
    pad: str | None = None
    """Name of the padding token; None: a usual name, or else the token that ends a document (padding is masked)."""

    def __post_init__(self) -> None:
        known = sorted(TokenizerKind.registry)
        if self.kind not in known:
            raise ValueError(f"tokenizer.kind={self.kind!r}: expected one of {known}.{near_misses(self.kind, known)}")
        reads_file = TokenizerKind.find(self.kind).reads_file
        if reads_file and self.path is None:
            raise ValueError(f"tokenizer.kind={self.kind!r} needs a file: set tokenizer.path")
        if not reads_file and self.path is not None:
            raise ValueError(f"tokenizer.kind={self.kind!r} reads no file, got tokenizer.path={self.path!r}")


class FileTokenizer:
    """A `Tokenizer` that one file in a workdir can hold.

    Args:
      config: names of the special tokens, and the path for messages.
    """

    vocab_size: int
    pad_id: int
    eos_id: int
    answer_id: int | None
    file_name: ClassVar[str]
    cuts: re.Pattern[str] = _CUTS  # where a long text may be cut, if the tokens around the cut stay the same

    def __init__(self, config: TokenizerConfig):
        self.config = config
        self.name = f"path={config.path!r}" if config.path else f"kind={config.kind!r}"

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added, and no text turns into a special token.

        Tokenizers such as SentencePiece write a blank before a text. It replaces the one that `text` begins with: a
        sentence with its leading blank has the same tokens alone as after another. Half of a surrogate pair is read
        as U+FFFD.

        Raises:
          UserError: the tokenizer cannot represent `text`.
        """
        text = clean_text(text)
        return self._checked(text) if len(text) <= _PIECE else self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids as [tokens] uint32. A long text is encoded in pieces, so that memory is bounded."""
        arrays = [np.array(self._checked(piece), np.uint32) for piece in self._pieces(clean_text(text))]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; special tokens and ids outside the vocabulary are left out."""
        raise NotImplementedError

    def serialized(self) -> bytes:
        """What the file holds."""
        raise NotImplementedError

    def vocabulary(self) -> dict[str, int]:
        """Every token's name and id."""
        raise NotImplementedError

    def special_ids(self) -> dict[str, int]:
        """Tokens that no text becomes, by name, such as the marks of a chat template."""
        return {}

    def behaviour(self) -> bytes:
        """All that decides the tokens of a text, equal for every version of the library."""
        raise NotImplementedError

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal tokens: it covers merges, normalizer and splits with the vocabulary."""
        return "v2:" + hashlib.sha256(self.behaviour()).hexdigest()[:16]

    @functools.cached_property
    def vocabulary_fingerprint(self) -> str:
        """The fingerprint of versions before "v2:", which covers names and ids only."""
        return hashlib.sha256(json.dumps(sorted(self.vocabulary().items())).encode()).hexdigest()[:16]

    def _encode(self, text: str) -> list[int]:
        """Token ids of a text without surrogates; it may raise whatever the library raises."""
        raise NotImplementedError

    def _checked(self, text: str) -> list[int]:
        try:
            return self._encode(text)
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"data.tokenizer {self.name}: cannot encode {text[:60]!r}: {reason}", status=1) from error

    def _pieces(self, text: str) -> Iterator[str]:
        """The text in pieces whose tokens are those of the text; a text without a place for a cut stays one piece."""
        start = 0
        while len(text) - start > _PIECE:
            matches = self.cuts.finditer(text, start + _PIECE // 2)
            end = next((match.start() for match in matches if self._may_cut(text, match.start())), len(text))
            yield text[start:end]
            start = end
        if start < len(text) or not text:
            yield text[start:]

    def _may_cut(self, text: str, at: int) -> bool:
        before, after = text[max(0, at - _AROUND) : at], text[at : at + _AROUND]
        return self._checked(before + after) == self._checked(before) + self._checked(after)


class TokenizerKind(Family):
    """A kind of tokenizer; a subclass registers itself, and `TokenizerConfig.kind` names it.

    Libraries of tokenizers are slow to import, so a kind imports them in its methods only.
    """

    reads_file: ClassVar[bool]  # whether `TokenizerConfig.path` names a file that it reads
    file_name: ClassVar[str]  # in a workdir

    @classmethod
    def build(cls, config: TokenizerConfig, corpus: Callable[[], list[str]], vocab_size: int) -> FileTokenizer:
        """A new tokenizer.

        Args:
          config: names of the special tokens, and the file.
          corpus: gives the texts to train on.
          vocab_size: the most tokens it may have.
        """
        raise NotImplementedError

    @classmethod
    def parse(cls, content: bytes, config: TokenizerConfig) -> FileTokenizer:
        """The tokenizer that a file holds; `config.path` names the file in messages."""
        raise NotImplementedError


def special_id(
    find: Callable[[str], int | None], name: str | None, usual: tuple[str, ...], field: str, config: TokenizerConfig
) -> int | None:
    """Id of the token called `name`, which must exist, or of the first usual name that exists."""
    if name is None:
        return next((i for i in map(find, usual) if i is not None), None)
    found = find(name)
    if found is None:
        raise UserError(f"data.tokenizer.{field}={name!r}: no such token in {config.path or config.kind}")
    return found
