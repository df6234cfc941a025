"""Tokenizers of the `tokenizers` library: a JSON file, a byte-level BPE trained on the corpus, and plain bytes."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from lm2_jax.data.files import clean_text, decode, parse_json, read_bytes
from lm2_jax.data.tokenizer_base import (
    ANSWER,
    BLANKS,
    CONTROL_NAMES,
    EOS_NAMES,
    MOST_TOKENS,
    PAD_NAMES,
    SPECIALS,
    FileTokenizer,
    TokenizerConfig,
    TokenizerKind,
    special_id,
)
from lm2_jax.errors import UserError

if TYPE_CHECKING:
    import tokenizers

SMALLEST_BPE = 256 + len(SPECIALS)

_UNKNOWN_NAMES = ("<unk>", "[UNK]", "<|unk|>")
_LONGEST_WORD = 512  # characters; the time of training a BPE grows with the square of the longest word
_LONG_RUN = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}|\s{{{_LONGEST_WORD + 1},}}")


class JsonTokenizer(FileTokenizer):
    """Wraps a tokenizer of the `tokenizers` library.

    Truncation, padding and BPE dropout are switched off: the tokens of a text are all of them, and always the same.

    Args:
      plain: what the library's JSON file holds.
      config: names of the special tokens, and the path for messages.
    Raises:
      UserError: a damaged file, or no token that ends a document.
    """

    file_name = "tokenizer.json"

    def __init__(self, plain: dict[str, Any], config: TokenizerConfig):
        super().__init__(config)
        self._inner = inner = _load(plain, config)
        # Llama 2's writes its blank here, in addition to the text's own; what the library calls Metaspace does not.
        normalizer = inner.normalizer
        self._writes_blank = normalizer is not None and normalizer.normalize_str("a").startswith(BLANKS)
        vocabulary = inner.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"data.tokenizer.path={config.path!r}: its vocabulary is empty", status=1)
        # Ids may have holes, so their number is no bound.
        self.vocab_size = 1 + max(vocabulary.values())
        eos = special_id(inner.token_to_id, config.eos, EOS_NAMES, "eos", config)
        if eos is None:
            raise UserError(
                f"data.tokenizer: no token that ends a document in {config.path or config.kind}; looked for "
                f"{list(EOS_NAMES)}. Set data.tokenizer.eos to the name it has there."
            )
        pad = special_id(inner.token_to_id, config.pad, PAD_NAMES, "pad", config)
        self.eos_id, self.pad_id = eos, eos if pad is None else pad
        self.answer_id = inner.token_to_id(ANSWER)
        special = {token["content"] for token in plain["added_tokens"] if token.get("special")}
        names = (special | set(CONTROL_NAMES)) - set(_UNKNOWN_NAMES)
        self._reserved = {vocabulary[name] for name in names if name in vocabulary} | {self.eos_id, self.pad_id}
        self._letters = _letters(plain)
        model = plain["model"]
        if model.get("type") == "BPE" and not model.get("merges") and not model.get("ignore_merges"):
            self.cuts = re.compile("")  # every letter is a token

    def _encode(self, text: str) -> list[int]:
        text = text.removeprefix(" ") if self._writes_blank else text
        if self._letters is not None:
            self._check_letters(text)
        ids = self._inner.encode(text, add_special_tokens=False).ids
        if self._reserved.isdisjoint(ids):
            return ids
        return [part for i in ids for part in (self._spelled(i) if i in self._reserved else (i,))]

    def _spelled(self, special: int) -> tuple[int, ...]:
        """Tokens of a special token's name where a text has these characters."""
        name = self._inner.id_to_token(special) or ""
        for cut in range(1, len(name)):
            parts = (token.id for part in (name[:cut], name[cut:]) for token in self._inner.model.tokenize(part))
            ids = tuple(parts)
            if self._reserved.isdisjoint(ids):
                return ids
        raise UserError(
            f"data.tokenizer {self.name}: a text contains {name!r}, a special token, and the vocabulary cannot write "
            "it in another way; choose another token with data.tokenizer.eos and data.tokenizer.pad",
            status=1,
        )

    def _check_letters(self, text: str) -> None:
        """Refuses a text with letters that the library would leave out without a word."""
        normalizer, splitter = self._inner.normalizer, self._inner.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        words = [text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]
        missing = set().union(*words) - (self._letters or set())
        if missing:
            raise UserError(
                f"data.tokenizer {self.name}: has no token for {sorted(missing)[:5]} and no unknown token; use a "
                "tokenizer that can represent every text, such as one with byte fallback",
                status=1,
            )

    def decode(self, ids: list[int]) -> str:
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size and i not in self._reserved]
        return self._inner.decode(kept, skip_special_tokens=True)

    def serialized(self) -> bytes:
        return self._inner.to_str().encode()

    def vocabulary(self) -> dict[str, int]:
        return self._inner.get_vocab(with_added_tokens=True)

    def special_ids(self) -> dict[str, int]:
        return {name: token for token in self._reserved if (name := self._inner.id_to_token(token))}

    def behaviour(self) -> bytes:
        plain = json.loads(self._inner.to_str())
        parts = ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")
        kept = _without_defaults({part: plain.get(part) for part in parts})
        merges = kept["model"].get("merges")
        if merges:  # pairs, or in older versions of the library a text
            kept["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        return json.dumps(kept, sort_keys=True).encode()


def _without_defaults(value: Any) -> Any:
    """`value` without fields that are null or false: a new version of the library may write more of them."""
    if isinstance(value, dict):
        return {key: _without_defaults(item) for key, item in value.items() if item is not None and item is not False}
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def _load(plain: dict[str, Any], config: TokenizerConfig) -> "tokenizers.Tokenizer":
    """The library's tokenizer; `plain` is changed so that it does what is promised."""
    import tokenizers  # slow to import

    broken = f"data.tokenizer.path={config.path!r}: not a `tokenizers` JSON"
    model, added = plain.get("model"), plain.setdefault("added_tokens", [])
    is_table = isinstance(model, dict) and isinstance(added, list) and all(isinstance(t, dict) for t in added)
    if not isinstance(model, dict) or not is_table:
        raise UserError(f"{broken}: expected a table `model` and a list `added_tokens`", status=1)
    _check_ids(model, added, broken)
    model["dropout"] = None  # else a text has other tokens at each call
    for token in added:  # so that their names in a text stay text
        token["special"] = bool(token.get("special")) or token.get("content") in (
            *CONTROL_NAMES,
            config.eos,
            config.pad,
        )
    try:
        inner = tokenizers.Tokenizer.from_str(json.dumps(plain))
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        inner.decode(inner.encode("a b", add_special_tokens=False).ids)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and a panic in Rust is not even that
        if "unk" in str(error).lower():  # a vocabulary without "a", "b" or a blank: said for the text that needs it
            return inner
        raise UserError(f"{broken}: {error}", status=1) from error
    return inner


def _check_ids(model: dict[str, Any], added: list[dict[str, Any]], broken: str) -> None:
    """Refuses vocabularies that no trainer writes: ids that are shared, negative or huge."""
    vocabulary = model.get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    wrong = next(
        (i for i in (*ids, *(t.get("id") for t in added)) if type(i) is not int or not 0 <= i < MOST_TOKENS), 0
    )
    if wrong != 0:
        raise UserError(f"{broken}: expected token ids from 0 to {MOST_TOKENS}, got {wrong!r}", status=1)
    if len(set(ids)) < len(ids):
        raise UserError(f"{broken}: {len(ids) - len(set(ids))} ids belong to several tokens", status=1)
    names = {i: name for name, i in vocabulary.items()} if isinstance(vocabulary, dict) else {}
    for token in added:
        index, name = token["id"], token.get("content")
        if names.setdefault(index, name) != name:
            raise UserError(
                f"{broken}: id {index} is {names[index]!r} in the vocabulary and {name!r} among the added tokens",
                status=1,
            )


def _letters(plain: dict[str, Any]) -> set[str] | None:
    """Letters that a BPE without an unknown token can represent; None: it represents every text."""
    model = plain["model"]
    if model.get("type") != "BPE" or model.get("unk_token") is not None:
        return None
    vocabulary = model["vocab"]
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return None
    if "ByteLevel" in json.dumps(plain.get("pre_tokenizer")) and all(letter in vocabulary for letter in byte_letters()):
        return None
    affixes = (model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or "")
    names = (name.removeprefix(affixes[0]).removesuffix(affixes[1]) for name in vocabulary)
    letters = {name for name in (*vocabulary, *names) if len(name) == 1}
    return letters.union(*(token["content"] for token in plain["added_tokens"]))


def byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each of the 256 bytes, in the order of the bytes."""
    # Printable Latin-1 bytes are their own letters; the others, which include the blank, are U+0100 onwards, in order.
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def _byte_level(model: "tokenizers.models.Model", split_words: bool) -> "tokenizers.Tokenizer":
    import tokenizers

    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _with_short_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut inside words (and runs of blanks) of more than `_LONGEST_WORD` characters."""
    for text in map(clean_text, texts):
        start = 0
        for run in _LONG_RUN.finditer(text):
            yield text[start : run.start()]
            yield from (text[i : min(i + _LONGEST_WORD, run.end())] for i in range(*run.span(), _LONGEST_WORD))
            start = run.end()
        yield text[start:]


class _JsonKind(TokenizerKind, abstract=True):
    """What `JsonTokenizer` wraps, and a workdir keeps as its JSON file."""

    file_name = JsonTokenizer.file_name

    @classmethod
    def parse(cls, content: bytes, config: TokenizerConfig) -> JsonTokenizer:
        where = f"data.tokenizer.path={config.path!r}"
        plain = parse_json(decode(content, where), f"{where}: not a `tokenizers` JSON")
        if not isinstance(plain, dict):
            raise UserError(f"{where}: not a `tokenizers` JSON, which is a table", status=1)
        return JsonTokenizer(plain, config)


class JsonFile(_JsonKind):
    """A `tokenizers` JSON file."""

    kind: ClassVar[str] = "json"
    reads_file = True

    @classmethod
    def build(cls, config: TokenizerConfig, corpus: Callable[[], list[str]], vocab_size: int) -> JsonTokenizer:
        return cls.parse(read_bytes(config.path or ""), config)


class TrainedBpe(_JsonKind):
    """A byte-level BPE of at most `vocab_size` tokens, the same for the same corpus."""

    kind: ClassVar[str] = "bpe"
    reads_file = False

    @classmethod
    def build(cls, config: TokenizerConfig, corpus: Callable[[], list[str]], vocab_size: int) -> JsonTokenizer:
        import tokenizers

        if vocab_size < SMALLEST_BPE:
            raise UserError(
                f"model.vocab_size={vocab_size} is too small for data.tokenizer.kind='bpe', which needs 256 bytes and "
                f"{len(SPECIALS)} special tokens: set model.vocab_size to at least {SMALLEST_BPE}"
            )
        inner = _byte_level(tokenizers.models.BPE(), split_words=True)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=byte_letters(),
            show_progress=False,
        )
        inner.train_from_iterator(_with_short_words(corpus()), trainer)
        return JsonTokenizer(json.loads(inner.to_str()), config)


class Bytes(_JsonKind):
    """Bytes as a BPE without merges, so that they are kept and read like the others: id = byte + number of specials."""

    kind: ClassVar[str] = "bytes"
    reads_file = False

    @classmethod
    def build(cls, config: TokenizerConfig, corpus: Callable[[], list[str]], vocab_size: int) -> JsonTokenizer:
        import tokenizers

        vocabulary = {letter: len(SPECIALS) + byte for byte, letter in enumerate(byte_letters())}
        vocabulary |= {name: index for index, name in enumerate(SPECIALS)}
        inner = _byte_level(tokenizers.models.BPE(vocab=vocabulary, merges=[]), split_words=False)
        inner.add_special_tokens(list(SPECIALS))
        return JsonTokenizer(json.loads(inner.to_str()), config)
