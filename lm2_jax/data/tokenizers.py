"""Text to tokens: a BPE trained on the corpus, any `tokenizers` JSON, a SentencePiece model, or plain bytes.

A new kind is a `TokenizerKind` in a module of its own and an import of that module here.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from etils import epath

from lm2_jax.atomic import write_file
from lm2_jax.data.base import Tokenizer
from lm2_jax.data.tokenizer_base import FileTokenizer, TokenizerConfig, TokenizerKind
from lm2_jax.data.tokenizer_json import SMALLEST_BPE, JsonTokenizer
from lm2_jax.data.tokenizer_sentencepiece import SentencePieceTokenizer
from lm2_jax.errors import UserError

__all__ = [
    "SMALLEST_BPE",
    "FileTokenizer",
    "JsonTokenizer",
    "SentencePieceTokenizer",
    "TokenizerConfig",
    "TokenizerKind",
    "build_tokenizer",
    "load_tokenizer",
    "save_tokenizer",
    "token_array",
]


def token_array(tokenizer: Tokenizer, text: str, where: str = "") -> np.ndarray:
    """Token ids of a document, [tokens] uint32.

    Args:
      tokenizer: the tokenizer.
      text: the document's text.
      where: file and row of the document, for messages.
    Raises:
      UserError: the tokenizer cannot represent the text.
    """
    if not isinstance(tokenizer, FileTokenizer):
        return np.array(tokenizer.encode(text), np.uint32)
    try:
        return tokenizer.encode_array(text)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error), error.status) from error


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
    if workdir is not None and any((epath.Path(workdir) / name).exists() for name in _readers()):
        tokenizer = load_tokenizer(workdir, config)
    else:
        tokenizer = TokenizerKind.find(config.kind).build(config, corpus, vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"data.tokenizer of kind {config.kind!r} has {tokenizer.vocab_size} tokens but {size_field} is "
            f"{vocab_size}: set {size_field} to at least {tokenizer.vocab_size}, or choose a smaller tokenizer"
        )
    return tokenizer


def save_tokenizer(tokenizer: FileTokenizer, workdir: epath.PathLike) -> epath.Path:
    """Writes the tokenizer's file into `workdir` and gives its path; a file with that content stays as it is."""
    path = epath.Path(workdir) / tokenizer.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, tokenizer.serialized())
    return path


def load_tokenizer(
    workdir: epath.PathLike, config: TokenizerConfig | None = None, fingerprint: str | None = None
) -> FileTokenizer:
    """The tokenizer that `save_tokenizer` wrote.

    Args:
      workdir: folder or bucket of a run.
      config: the run's tokenizer config; needed only where it names special tokens of its own.
      fingerprint: what its fingerprint has to be, where known; a file with another one is refused.
    Raises:
      UserError: no file, a damaged file, or another tokenizer than expected.
    """
    for name, kind in _readers().items():
        path = epath.Path(workdir) / name
        if path.exists():
            names = dataclasses.replace(config or TokenizerConfig(), kind=kind.kind, path=str(path))
            tokenizer = kind.parse(path.read_bytes(), names)
            if fingerprint not in (None, tokenizer.fingerprint, tokenizer.vocabulary_fingerprint):
                raise UserError(
                    f"{path}: expected the tokenizer with fingerprint {fingerprint}, this one has "
                    f"{tokenizer.fingerprint}; the file was changed or damaged, restore it",
                    status=1,
                )
            return tokenizer
    raise UserError(f"{workdir}: no tokenizer there; expected one of {list(_readers())}")


def _readers() -> dict[str, type[TokenizerKind]]:
    """The kinds that read a file, by the name of that file in a workdir."""
    return {kind.file_name: kind for kind in TokenizerKind.registry.values() if kind.reads_file}
