"""Turns text into token shards: `python -m lm2_jax.data.convert --out DIR --text FOLDER`, or `--tfds NAME`."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import tyro

from lm2_jax import cli
from lm2_jax.data.shards import empty_folder, write_shards
from lm2_jax.data.text_source import TextFiles, TfdsDocuments, TfdsText, file_documents
from lm2_jax.data.tokenizers import TokenizerConfig, build_tokenizer
from lm2_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """Text to token shards; give either `text` or `tfds`."""

    out: str
    """Folder for the shards, new or empty."""
    text: str | None = None
    """Folder of .txt files (a document each) and .jsonl files (a document a line)."""
    tfds: str | None = None
    """Name of a prepared tensorflow-datasets set."""
    split: str = "train"
    """Split of the set."""
    data_dir: str | None = None
    """Where the set was prepared; None: TFDS's default."""
    field: str = "text"
    """Name of the text in .jsonl lines or in the set."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How text becomes tokens; the shards keep it."""
    vocab_size: int = 32_000
    """Most tokens the tokenizer may have; a BPE is trained to it."""
    tokens_per_shard: int = 50_000_000
    """A new file begins after this many tokens."""
    seed: int = 0
    """Chooses the sample that a BPE is trained on."""


def convert(conversion: Conversion) -> dict[str, Any]:
    """Writes the shards and gives what their `dataset.json` holds."""
    if (conversion.text is None) == (conversion.tfds is None):
        raise UserError(f"give either --text or --tfds, got text={conversion.text!r} and tfds={conversion.tfds!r}")
    empty_folder(conversion.out)  # before a tokenizer is trained
    texts: Iterable[str]
    if conversion.text is not None:
        texts = file_documents(conversion.text, conversion.field)
        source = TextFiles(path=conversion.text, field=conversion.field)
    else:
        name = conversion.tfds or ""
        texts = TfdsDocuments(name, conversion.split, conversion.data_dir, conversion.field)
        source = TfdsText(name=name, split=conversion.split, data_dir=conversion.data_dir, field=conversion.field)
    tokenizer = build_tokenizer(
        conversion.tokenizer,
        lambda: source.corpus(conversion.seed),
        conversion.vocab_size,
        size_field="--vocab-size",
    )
    return write_shards(map(tokenizer.encode, texts), tokenizer, conversion.out, conversion.tokens_per_shard)


def main() -> None:
    """The command."""
    conversion = tyro.cli(Conversion, description=__doc__)
    written = convert(conversion)
    print(
        f"{conversion.out}: {written['documents']} documents, {written['tokens']} tokens ({written['dtype']}) in "
        f"{len(written['files'])} files; {written['empty_documents']} empty documents left out"
    )


if __name__ == "__main__":
    cli.run(main)
