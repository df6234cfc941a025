"""Turns any run into one that trains on a person's own text."""

import dataclasses
import math
import os
from collections.abc import Callable

from etils import epath

from lm2_jax.atomic import is_remote
from lm2_jax.config import LossConfig, RunConfig
from lm2_jax.data.text_files import read_documents
from lm2_jax.data.text_source import TextFiles
from lm2_jax.data.tokenizer_base import TokenizerConfig, TokenizerKind
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
      path: a file, a folder or a glob pattern of .txt, .md, .jsonl, .json or .parquet files.
      field: name under which a row of a .jsonl, .json or .parquet file has its text.
      report: is called with one line that says what was chosen.
    Returns:
      The changed run.
    Raises:
      UserError: no text there, a file that cannot be read, less than 1,000 characters, or more than 256 MB.
    """
    source = TextFiles(
        path=os.fspath(path) if is_remote(path) else os.path.abspath(os.path.expanduser(path)), field=field
    )
    lengths = _lengths(source)
    characters = sum(lengths)
    if characters < _FEWEST_CHARACTERS:
        raise UserError(
            f"{path}: {characters} characters of text; expected at least {_FEWEST_CHARACTERS} to train on and to hold "
            "some out"
        )
    tokenizer, vocab_size, per_token = _tokenizer(run, characters)
    segments = max(run.data.segments)
    tokens = characters / per_token
    rows = run.data.rows
    while rows > 1 and rows * segments * run.model.segment_tokens > tokens:
        rows //= 2
    wanted = max(_FEWEST_DOCUMENTS, math.ceil(1.25 * rows))
    most = None if len(lengths) >= wanted else max(_FEWEST_CHARACTERS // 5, characters // wanted)
    documents = len(lengths) if most is None else sum(-(-length // most) for length in lengths)
    fraction = 0.05 if documents < 200 else 0.02
    rows = min(rows, documents - math.ceil(fraction * documents))
    ordered = run.model.has_memory or not run.model.takes_packed
    source = dataclasses.replace(
        source,
        document_characters=most,
        held_out_fraction=fraction,
        packing="ordered" if ordered else "packed",
    )
    accumulate = next(n for n in range(run.optim.accumulate, 0, -1) if rows % n == 0)
    report(
        f"{path}: {len(lengths):,} documents, {characters:,} characters, about {tokens:,.0f} tokens; tokenizer "
        f"{tokenizer.path or tokenizer.kind} with {vocab_size:,} entries; {rows} rows of {segments} segments of "
        f"{run.model.segment_tokens} tokens; {fraction:.0%} of "
        f"{'the documents' if most is None else f'{documents:,} parts of the text'} held out"
    )
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, vocab_size=vocab_size),
        data=dataclasses.replace(
            run.data,
            source=source,
            tokenizer=tokenizer,
            rows=rows,
            segments=(segments,),
            stage_steps=(),
            vary_segments=False,
            fill_rows=False,
            carry_state=ordered and run.model.has_memory,
        ),
        loss=dataclasses.replace(run.loss, text_weight=run.loss.text_weight or LossConfig().answer_weight),
        optim=dataclasses.replace(run.optim, accumulate=accumulate),
        train=dataclasses.replace(run.train, eval_batches=max(run.train.eval_batches, 4)),
    )


def _lengths(source: TextFiles) -> list[int]:
    """Characters of each document that is not empty; too much text is a `UserError`."""
    lengths, read = [], 0
    for document in read_documents(source.path, source.field):
        if document.text:
            lengths.append(len(document.text))
            read += lengths[-1]
        source.check_size(read)
    return lengths


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
