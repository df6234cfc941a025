"""Whether a checkpoint fits a run that is about to begin: `train.py PRESET --init.from SOURCE`."""

import dataclasses
import os
import pathlib
from typing import NamedTuple

from lm2_jax.atomic import is_remote
from lm2_jax.checkpoint import FOLDER
from lm2_jax.config import RunConfig
from lm2_jax.data.files import read_bytes
from lm2_jax.data.tokenizers import FileTokenizer, TokenizerKind, load_tokenizer
from lm2_jax.decoder import DecoderConfig
from lm2_jax.errors import UserError
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.pretrained import locate, own_config
from lm2_jax.interop.workdir import parse_tokenizer, tokenizer_files

_FREE = {
    "attention_kernel",
    "lora",
    "max_tokens",
    "window_tokens",
}  # fields of a decoder that change no weight of a checkpoint


class _Found(NamedTuple):
    """What has to be equal."""

    decoder: DecoderConfig
    vocab_size: int
    tokenizer: FileTokenizer


def check_first_weights(source: str | os.PathLike[str], run: RunConfig) -> None:
    """Compares decoder and tokenizer of a checkpoint with those of a run, before anything is written.

    The workdir of another run is compared later, parameter by parameter.

    Args:
      source: of `--init.from`.
      run: the new run.
    Raises:
      UserError: they differ, with the fields and the command that imports the checkpoint; or no such checkpoint.
    """
    name = os.fspath(source)
    if is_remote(name) or (pathlib.Path(name) / FOLDER).exists():
        return
    found, problems = _open(name), []
    for field in dataclasses.fields(DecoderConfig):
        theirs, ours = getattr(found.decoder, field.name), getattr(run.model.decoder, field.name)
        if field.name == "head_width":
            theirs, ours = found.decoder.head_dim, run.model.decoder.head_dim
        if field.name not in _FREE and theirs != ours:
            problems.append(f"  model.decoder.{field.name}: {theirs!r} there, {ours!r} in the run")
    if found.vocab_size != run.model.vocab_size:
        problems.append(f"  model.vocab_size: {found.vocab_size} there, {run.model.vocab_size} in the run")
    if _fingerprint(run) != found.tokenizer.fingerprint:
        problems.append(f"  data.tokenizer: its {found.tokenizer.file_name} there, {_shown(run)} in the run")
    if problems:
        option = "--memory" if run.model.has_memory else "--run"
        raise UserError(
            f"--init.from {name}: this checkpoint does not fit the run. Fields that differ:\n"
            + "\n".join(problems)
            + "\nSet them as they are there; or import the checkpoint, which sets them:\n"
            f"  python -m lm2_jax.interop.import_hf {name} --workdir NEW {option} {run.name}"
        )


def _open(name: str) -> _Found:
    folder = locate(name)
    own = own_config(folder)
    if own is not None:
        return _Found(own.model.decoder, own.model.vocab_size, load_tokenizer(folder, own.data.tokenizer))
    opened = open_source(folder)
    opened.where = name
    spec = opened.spec
    return _Found(
        spec.decoder, spec.vocab_size, parse_tokenizer(tokenizer_files(opened, None), spec.vocab_size, folder, name)
    )


def _fingerprint(run: RunConfig) -> str | None:
    """Of the run's tokenizer; None for one that is not read from a file."""
    config = run.data.tokenizer
    kind = TokenizerKind.find(config.kind)
    return kind.parse(read_bytes(config.path or ""), config).fingerprint if kind.reads_file else None


def _shown(run: RunConfig) -> str:
    config = run.data.tokenizer
    return f"kind {config.kind!r}" + (f" from {config.path}" if config.path else "")
