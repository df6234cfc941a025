"""Text to tokens: a BPE trained on the corpus, any `tokenizers` JSON, a SentencePiece model, or plain bytes."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from typing import ClassVar, Literal

import sentencepiece
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from lm2_jax.errors import UserError

PAD, EOS, ANSWER = "<pad>", "<eos>", "<answer>"
SPECIALS = (PAD, EOS, ANSWER)
EOS_NAMES = (EOS, "</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
PAD_NAMES = (PAD, "<|padding|>", "<|pad|>", "<|finetune_right_pad_id|>", "[PAD]")
BLANKS = (" ", "\u2581")  # as they are, and as SentencePiece shows them
SMALLEST_BPE = 256 + len(SPECIALS)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens; `data.tokenizer` of a run."""

    kind: Literal["bpe", "json", "sentencepiece", "bytes"] = "bpe"
    """Byte-level BPE trained on the source's text, a `tokenizers` JSON, a SentencePiece model, or 256 bytes."""
    path: str | None = None
    """File of kind "json" or "sentencepiece"; the other kinds read none."""
    eos: str | None = None
    """Name of the token that ends a document; None: the first usual name that the vocabulary has."""
    pad: str | None = None
    """Name of the padding token; None: a usual name, or else the token that ends a document (padding is masked)."""

    def __post_init__(self) -> None:
        reads_file = self.kind in ("json", "sentencepiece")
        if reads_file and self.path is None:
            raise ValueError(f"tokenizer.kind={self.kind!r} needs a file: set tokenizer.path")
        if not reads_file and self.path is not None:
            raise ValueError(f"tokenizer.kind={self.kind!r} reads no file, got tokenizer.path={self.path!r}")


class FileTokenizer:
    """A `Tokenizer` that one file in a workdir can hold."""

    file_name: ClassVar[str]

    vocab_size: int
    pad_id: int
    eos_id: int
    answer_id: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added, and no text turns into a special token.

        Tokenizers of SentencePiece's kind write a blank before a text. It stands for the one that `text` begins with:
        a sentence with its leading blank has the same tokens alone as behind another.
        """
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; special tokens and ids outside the vocabulary are left out."""
        raise NotImplementedError

    def serialized(self) -> bytes:
        """What the file holds."""
        raise NotImplementedError

    def vocabulary(self) -> dict[str, int]:
        """Every token's name and id."""
        raise NotImplementedError

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for equal vocabularies; the file itself may change with the version of a library."""
        return hashlib.sha256(json.dumps(sorted(self.vocabulary().items())).encode()).hexdigest()[:16]


class JsonTokenizer(FileTokenizer):
    """Wraps a tokenizer of the `tokenizers` library.

    Args:
      inner: the library's tokenizer; its truncation and padding are switched off.
      config: names of the special tokens, and the path for messages.
    """

    file_name = "tokenizer.json"

    def __init__(self, inner: tokenizers.Tokenizer, config: TokenizerConfig):
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # "<eos>" written in a text stays text
        self._inner = inner
        # Llama 2's writes its blank here, beside the text's own; what the library calls Metaspace does not double it.
        normalizer = inner.normalizer
        self._writes_blank = normalizer is not None and normalizer.normalize_str("a").startswith(BLANKS)
        vocabulary = inner.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"data.tokenizer.path={config.path!r}: its vocabulary is empty", status=1)
        # Ids may have holes, so their number is no bound.
        self.vocab_size = 1 + max(vocabulary.values())
        eos = _special(inner.token_to_id, config.eos, EOS_NAMES, "eos", config)
        if eos is None:
            raise UserError(
                f"data.tokenizer: no token that ends a document in {config.path or config.kind}; looked for "
                f"{list(EOS_NAMES)}. Set data.tokenizer.eos to the name it has there."
            )
        pad = _special(inner.token_to_id, config.pad, PAD_NAMES, "pad", config)
        self.eos_id, self.pad_id = eos, eos if pad is None else pad
        self.answer_id = inner.token_to_id(ANSWER)

    def encode(self, text: str) -> list[int]:
        text = text.removeprefix(" ") if self._writes_blank else text
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._inner.decode([int(i) for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=True)

    def serialized(self) -> bytes:
        return self._inner.to_str().encode()

    def vocabulary(self) -> dict[str, int]:
        return self._inner.get_vocab(with_added_tokens=True)


class SentencePieceTokenizer(FileTokenizer):
    """Wraps a SentencePiece model.

    Args:
      model: content of the .model file.
      config: names of the special tokens, and the path for messages.
    """

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, config: TokenizerConfig):
        inner = sentencepiece.SentencePieceProcessor()
        inner.LoadFromSerializedProto(model)
        self._inner, self._model = inner, model
        self._writes_blank = inner.encode("a", out_type=str)[0].startswith(BLANKS)
        self.vocab_size = inner.vocab_size()

        def find(name: str) -> int | None:
            index = inner.piece_to_id(name)
            return index if inner.id_to_piece(index) == name else None  # an unknown piece gives the id of <unk>

        # The model itself says which ids these are, under whatever name; -1 stands for none.
        eos = inner.eos_id() if config.eos is None else _special(find, config.eos, (), "eos", config)
        pad = inner.pad_id() if config.pad is None else _special(find, config.pad, (), "pad", config)
        if eos is None or eos < 0:
            raise UserError(
                f"data.tokenizer: {config.path} marks no token that ends a document; "
                "set data.tokenizer.eos to the piece to use"
            )
        self.eos_id, self.pad_id = eos, eos if pad is None or pad < 0 else pad
        self.answer_id = find(ANSWER)

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text.removeprefix(" ") if self._writes_blank else text)

    def decode(self, ids: list[int]) -> str:
        skipped = {self.pad_id, self.eos_id, self.answer_id}
        return self._inner.decode([int(i) for i in ids if 0 <= i < self.vocab_size and i not in skipped])

    def serialized(self) -> bytes:
        return self._model

    def vocabulary(self) -> dict[str, int]:
        return {self._inner.id_to_piece(i): i for i in range(self.vocab_size)}


def _special(
    find: Callable[[str], int | None], name: str | None, usual: tuple[str, ...], field: str, config: TokenizerConfig
) -> int | None:
    """Id of the token called `name`, which must exist, or of the first usual name that exists."""
    if name is None:
        return next((i for i in map(find, usual) if i is not None), None)
    found = find(name)
    if found is None:
        raise UserError(f"data.tokenizer.{field}={name!r}: no such token in {config.path or config.kind}")
    return found


def _byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each of the 256 bytes, in the order of the bytes."""
    # Printable Latin-1 bytes stand for themselves; the others, which include the space, for U+0100 onwards, in turn.
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def _byte_level(model: models.Model, split_words: bool) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(config: TokenizerConfig, corpus: Callable[[], list[str]], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, the same for the same corpus."""
    if vocab_size < SMALLEST_BPE:
        raise UserError(
            f"model.vocab_size={vocab_size} is too small for data.tokenizer.kind='bpe', which needs 256 bytes and "
            f"{len(SPECIALS)} special tokens: set model.vocab_size to at least {SMALLEST_BPE}"
        )
    inner = _byte_level(models.BPE(), split_words=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=_byte_letters(),
        show_progress=False,
    )
    inner.train_from_iterator(corpus(), trainer)
    return JsonTokenizer(inner, config)


def _read(config: TokenizerConfig) -> bytes:
    path = epath.Path(config.path or "")
    if not path.is_file():
        raise UserError(f"data.tokenizer.path={config.path!r}: no such file; kind {config.kind!r} is read from one")
    return path.read_bytes()


def _parse_json(content: bytes, config: TokenizerConfig) -> JsonTokenizer:
    try:
        inner = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"data.tokenizer.path={config.path!r}: not a `tokenizers` JSON: {error}", status=1) from error
    return JsonTokenizer(inner, config)


def _parse_sentencepiece(content: bytes, config: TokenizerConfig) -> SentencePieceTokenizer:
    try:
        return SentencePieceTokenizer(content, config)
    except RuntimeError as error:
        raise UserError(f"data.tokenizer.path={config.path!r}: not a SentencePiece model: {error}", status=1) from error


def _bytes(config: TokenizerConfig, corpus: Callable[[], list[str]], vocab_size: int) -> JsonTokenizer:
    """Bytes as a BPE without merges, so that it is kept and read like the others: id = byte + number of specials."""
    vocabulary = {letter: len(SPECIALS) + byte for byte, letter in enumerate(_byte_letters())}
    vocabulary |= {name: index for index, name in enumerate(SPECIALS)}
    inner = _byte_level(models.BPE(vocab=vocabulary, merges=[]), split_words=False)
    inner.add_special_tokens(list(SPECIALS))
    return JsonTokenizer(inner, config)


_BUILDERS: dict[str, Callable[[TokenizerConfig, Callable[[], list[str]], int], FileTokenizer]] = {
    "bpe": train_bpe,
    "json": lambda config, corpus, vocab_size: _parse_json(_read(config), config),
    "sentencepiece": lambda config, corpus, vocab_size: _parse_sentencepiece(_read(config), config),
    "bytes": _bytes,
}

_PARSERS: dict[str, Callable[[bytes, TokenizerConfig], FileTokenizer]] = {
    JsonTokenizer.file_name: _parse_json,
    SentencePieceTokenizer.file_name: _parse_sentencepiece,
}


def build_tokenizer(
    config: TokenizerConfig,
    corpus: Callable[[], list[str]],
    vocab_size: int,
    workdir: epath.PathLike | None = None,
    size_field: str = "model.vocab_size",
) -> FileTokenizer:
    """The tokenizer of a run: the one its workdir holds, else a new one; nothing is written.

    Args:
      config: which tokenizer.
      corpus: gives the texts to train on; called only where a tokenizer is trained.
      vocab_size: the most tokens it may have.
      workdir: where an earlier start of the run may have saved its tokenizer.
      size_field: what the user calls `vocab_size`, for messages.
    Raises:
      UserError: for a missing or broken file, or more tokens than `vocab_size`.
    """
    if workdir is not None and any((epath.Path(workdir) / name).exists() for name in _PARSERS):
        tokenizer = load_tokenizer(workdir, config)
    else:
        tokenizer = _BUILDERS[config.kind](config, corpus, vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"data.tokenizer of kind {config.kind!r} has {tokenizer.vocab_size} tokens but {size_field} is "
            f"{vocab_size}: set {size_field} to at least {tokenizer.vocab_size}, or choose a smaller tokenizer"
        )
    return tokenizer


def save_tokenizer(tokenizer: FileTokenizer, workdir: epath.PathLike) -> epath.Path:
    """Writes the tokenizer's file into `workdir` and gives its path."""
    path = epath.Path(workdir) / tokenizer.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tokenizer.serialized())
    return path


def load_tokenizer(workdir: epath.PathLike, config: TokenizerConfig | None = None) -> FileTokenizer:
    """The tokenizer that `save_tokenizer` wrote.

    Args:
      workdir: folder or bucket of a run.
      config: the run's tokenizer config; needed only where it names special tokens of its own.
    """
    for name, parse in _PARSERS.items():
        path = epath.Path(workdir) / name
        if path.exists():
            names = config or TokenizerConfig()
            kind = "json" if name == JsonTokenizer.file_name else "sentencepiece"
            return parse(path.read_bytes(), dataclasses.replace(names, kind=kind, path=str(path)))
    raise UserError(f"{workdir}: no tokenizer there; expected one of {list(_PARSERS)}")
