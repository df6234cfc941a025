"""Turns text into token shards: `python -m lm2_jax.data.convert --out DIR --text PATH`, or `--tfds NAME`."""

import dataclasses
from typing import Any

from lm2_jax import cli
from lm2_jax.commands.dataclass_options import parse
from lm2_jax.data.shards import check_empty, write_shards
from lm2_jax.data.text_source import TextFiles, TfdsText
from lm2_jax.data.tokenizers import TokenizerConfig, build_tokenizer, token_array
from lm2_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """Text to token shards; give either `text` or `tfds`."""

    out: str
    """Folder for the shards, new or empty."""
    text: str | None = None
    """A file, a folder or a glob pattern: .txt and .md files (a document each), .jsonl, .json and .parquet files (a
    document a row)."""
    tfds: str | None = None
    """Name of a prepared tensorflow-datasets set."""
    split: str = "train"
    """Split of the set."""
    data_dir: str | None = None
    """Where the set was prepared; None: TFDS's default."""
    field: str = "text"
    """Name under which a row of a file, or an example of the set, has its text."""
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
    check_empty(conversion.out)  # before a tokenizer is trained
    if conversion.text is not None:
        source = TextFiles(path=conversion.text, field=conversion.field)
    else:
        source = TfdsText(
            name=conversion.tfds or "", split=conversion.split, data_dir=conversion.data_dir, field=conversion.field
        )
    documents = source.documents()
    tokenizer = build_tokenizer(
        conversion.tokenizer,
        lambda: source.corpus(conversion.seed),
        conversion.vocab_size,
        size_field="--vocab-size",
    )
    arrays = (token_array(tokenizer, document.text, document.where) for document in documents)
    return write_shards(arrays, tokenizer, conversion.out, conversion.tokens_per_shard)


def main() -> None:
    """The command."""
    conversion = parse(Conversion, cli.program("convert"), __doc__ or "")
    written = convert(conversion)
    print(
        f"{conversion.out}: {written['documents']} documents, {written['tokens']} tokens ({written['dtype']}) in "
        f"{len(written['files'])} files; {written['empty_documents']} empty documents left out"
    )


if __name__ == "__main__":
    cli.run(main)
