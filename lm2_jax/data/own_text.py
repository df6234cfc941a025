"""Turns any run into one that trains on a person's own text."""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from lm2_jax.atomic import is_remote
from lm2_jax.config import RunConfig
from lm2_jax.data.shards import METADATA, ShardDocuments, TokenShards
from lm2_jax.data.text_files import read_documents
from lm2_jax.data.text_source import TextFiles
from lm2_jax.data.tokenizers import TokenizerConfig, TokenizerKind, load_tokenizer
from lm2_jax.errors import UserError

_FEWEST_CHARACTERS = 1000
_FEWEST_FOR_BPE = 50_000  # characters; a BPE of less text learns the names in it
_FEWEST_DOCUMENTS = 20  # so that one of them, held out, is a small share
_SMALLEST_VOCABULARY, _LARGEST_VOCABULARY = 512, 32_768
_CHARACTERS_PER_ENTRY = 500  # of the text for each entry of a vocabulary


def own_text(
    run: RunConfig, path: epath.PathLike, field: str = "text", report: Callable[[str], None] = print
) -> RunConfig:
    """`run` with its data, tokenizer, vocabulary and loss changed so that it trains on the text at `path`.

    The model keeps its width, depth, memory and segment length; steps, learning rate and checkpoints are the run's.
    What is chosen follows from the text and the run alone, so that the same call resumes a run:

    - tokenizer: the run's own if it reads a file that exists; else bytes for less than 50,000 characters, else a BPE
      with an entry for every 500 characters, from 512 up to the run's vocabulary or 32,768;
    - documents: texts of fewer than 20 documents, or of fewer than the batch needs, are cut at paragraphs; 2 to 5
      per cent of the documents are held out, and the run reports the loss on them;
    - batch: fewer rows where the text is too short to fill them. A memory is carried through each document
      (packing="ordered", data.carry_state); a model without memory reads packed documents.

    Args:
      run: any run, such as a preset.
      path: a file, a folder or a glob pattern of .txt, .md, .jsonl, .json or .parquet files; or the folder of a shard
        set (`python -m lm2_jax.data.convert`), which has its own tokenizer.
      field: name under which a row of a .jsonl, .json or .parquet file has its text.
      report: is called with one line that says what was chosen.
    Returns:
      The changed run.
    Raises:
      UserError: no text there, a file that cannot be read, less than 1,000 characters, or more than 256 MB.
    """
    corpus = _shards(path) if (epath.Path(path) / METADATA).is_file() else _text(run, path, field)
    rows, segments = run.data.rows, max(run.data.segments)
    while rows > 1 and rows * segments * run.model.segment_tokens > corpus.tokens:
        rows //= 2
    source, documents = _enough_documents(corpus, math.ceil(1.25 * rows))
    fraction = 0.05 if documents < 200 else 0.02
    rows = max(1, min(rows, documents - math.ceil(fraction * documents)))
    accumulate = next(n for n in range(run.optim.accumulate, 0, -1) if rows % n == 0)
    cut = "documents" if documents == len(corpus.lengths) else "parts of the text"
    report(
        f"{path}: {len(corpus.lengths):,} documents, {corpus.size}, about {corpus.tokens:,} tokens; tokenizer "
        f"{corpus.tokenizer.path or corpus.tokenizer.kind}, vocabulary {corpus.vocab_size:,}; {rows} rows of "
        f"{segments} x {run.model.segment_tokens} tokens; {fraction:.0%} of {documents:,} {cut} held out"
    )
    ordered = run.model.has_memory or not run.model.takes_packed
    data = dataclasses.replace(
        run.data,
        source=dataclasses.replace(source, held_out_fraction=fraction, packing="ordered" if ordered else "packed"),
        tokenizer=corpus.tokenizer,
        rows=rows,
        segments=(segments,),
        stage_steps=(),
        vary_segments=False,
        fill_rows=False,
        carry_state=run.model.has_memory,
    )
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, vocab_size=corpus.vocab_size),
        data=data,
        loss=dataclasses.replace(run.loss, text_weight=run.loss.text_weight or 1.0),
        optim=dataclasses.replace(run.optim, accumulate=accumulate),
        train=dataclasses.replace(run.train, eval_batches=max(run.train.eval_batches, 4)),
    )


class _Corpus(NamedTuple):
    """A text that was read once."""

    source: TextFiles | TokenShards
    lengths: list[int]  # of each document, in characters or tokens
    size: str  # for the report
    tokens: int
    tokenizer: TokenizerConfig
    vocab_size: int


def _text(run: RunConfig, path: epath.PathLike, field: str) -> _Corpus:
    """Text files; too little or too much text is a `UserError`."""
    name = os.fspath(path) if is_remote(path) else os.path.abspath(os.path.expanduser(path))
    source, characters = TextFiles(path=name, field=field), 0
    lengths: list[int] = []
    for document in read_documents(path, field):
        if document.text:
            lengths.append(len(document.text))
            characters += lengths[-1]
        source.check_size(characters)
    if characters < _FEWEST_CHARACTERS:
        raise UserError(
            f"{path}: {characters} characters of text; expected at least {_FEWEST_CHARACTERS} to train on and to hold "
            "some out"
        )
    tokenizer, vocab_size, per_token = _tokenizer(run, characters)
    return _Corpus(source, lengths, f"{characters:,} characters", int(characters / per_token), tokenizer, vocab_size)


def _shards(path: epath.PathLike) -> _Corpus:
    """A shard set, with the tokenizer that made it."""
    folder = os.path.abspath(path)
    tokenizer = load_tokenizer(folder)
    documents = ShardDocuments(folder, tokenizer.eos_id, tokenizer.pad_id)
    lengths, tokens = documents.lengths.tolist(), documents.metadata["tokens"]
    source = TokenShards(path=folder)
    return _Corpus(source, lengths, "token shards", tokens, tokenizer.config, tokenizer.vocab_size)


def _enough_documents(corpus: _Corpus, rows: int) -> tuple[TextFiles | TokenShards, int]:
    """The source with documents cut so that each row has its own, and how many there are at least."""
    wanted, source = max(_FEWEST_DOCUMENTS, rows), corpus.source
    if len(corpus.lengths) >= wanted or not isinstance(source, TextFiles):
        return source, len(corpus.lengths)
    most = max(_FEWEST_CHARACTERS // 5, sum(corpus.lengths) // wanted)
    return dataclasses.replace(source, document_characters=most), sum(-(-length // most) for length in corpus.lengths)


def _tokenizer(run: RunConfig, characters: int) -> tuple[TokenizerConfig, int, float]:
    """The tokenizer, the size of the vocabulary, and about how many characters a token has."""
    own = run.data.tokenizer
    if TokenizerKind.find(own.kind).reads_file and epath.Path(own.path or "").is_file():
        return own, run.model.vocab_size, 4.0
    if characters < _FEWEST_FOR_BPE:
        return TokenizerConfig(kind="bytes"), _SMALLEST_VOCABULARY, 1.0
    largest = max(_SMALLEST_VOCABULARY, min(run.model.vocab_size, _LARGEST_VOCABULARY))
    fitting = 1 << int(math.log2(characters / _CHARACTERS_PER_ENTRY))
    vocab_size = min(max(fitting, _SMALLEST_VOCABULARY), largest)
    return TokenizerConfig(kind="bpe"), vocab_size, 1.5 + 0.5 * math.log2(vocab_size / 256)
