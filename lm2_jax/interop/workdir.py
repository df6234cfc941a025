"""An imported model as a workdir: step 0 of a run, which train.py resumes and eval.py evaluates."""

import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
from etils import epath

from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.checkpoint import Checkpoints
from lm2_jax.config import ModelConfig, RunConfig
from lm2_jax.data.tokenizers import FileTokenizer, TokenizerConfig, TokenizerKind
from lm2_jax.errors import UserError
from lm2_jax.interop.graft import Graft, Grafted, graft
from lm2_jax.interop.load import load_params, source_reader
from lm2_jax.interop.new_folder import new_folder
from lm2_jax.interop.source import Source, TokenizerFiles
from lm2_jax.layout import Layout
from lm2_jax.memory.none import NoMemory
from lm2_jax.model import LanguageModel
from lm2_jax.precision import FloatName, Precision, prepare_numbers
from lm2_jax.training import workdir as workdirs
from lm2_jax.training.state import make_plan

ORIGIN = "origin.json"  # in a workdir: where its weights come from
_SEGMENT = 512  # tokens of a segment where nothing else is said
_FILES = {"json": "tokenizer.json", "sentencepiece": "tokenizer.model"}


class Imported(NamedTuple):
    """What an import wrote."""

    config: RunConfig
    start: Graft
    origin: dict[str, Any]
    refusal: str  # why the run's data does not fit its tokenizer, empty where it does


def decoder_model(
    source: Source, segment_tokens: int | None = None, dtype: FloatName = "float32", like: ModelConfig | None = None
) -> ModelConfig:
    """The config of a checkpoint's decoder, with the memory that it was trained with, if any.

    Args:
      source: the checkpoint.
      segment_tokens: tokens of a segment, within which the decoder attends; None: 512, or fewer where the model was
        trained for fewer.
      dtype: of parameters and computation.
      like: gives what the checkpoint does not say, such as `remat`.
    """
    longest = source.spec.max_tokens
    if segment_tokens is not None and longest is not None and segment_tokens > longest:
        raise UserError(f"--segment-tokens {segment_tokens}: {source.where} was trained for at most {longest} tokens")
    like = ModelConfig() if like is None else like
    memory, join = source.memory or (NoMemory(), PlainJoin())
    try:
        return dataclasses.replace(
            like,
            vocab_size=source.spec.vocab_size,
            segment_tokens=segment_tokens or min(_SEGMENT, longest or _SEGMENT),
            decoder=dataclasses.replace(
                source.spec.decoder,
                attention_kernel=like.decoder.attention_kernel,
                lora=like.decoder.lora,
                max_tokens=like.decoder.max_tokens,
            ),
            memory=memory,
            join=join,
            schedule="auto",
            precision=dataclasses.replace(Precision(), params=dtype, compute=dtype),
        )
    except ValueError as error:
        raise UserError(f"{source.where}: {error}", status=1) from error


def import_source(
    source: Source,
    workdir: str | os.PathLike[str],
    layout: Layout,
    base: RunConfig = RunConfig(),
    memory: RunConfig | None = None,
    layers: tuple[int, ...] | None = None,
    segment_tokens: int | None = None,
    dtype: FloatName = "float32",
    tokenizer: pathlib.Path | None = None,
) -> Imported:
    """Writes a checkpoint of another project as step 0 of a run.

    The workdir appears when all of it is written.

    Args:
      source: the checkpoint.
      workdir: a new folder.
      layout: where arrays are placed on the way.
      base: data, loss, optimizer and training of the run.
      memory: a run whose memory and join are added to the decoder; None: none.
      layers: blocks that get the memory; None: as `memory` says.
      segment_tokens: see `decoder_model`.
      dtype: of parameters and computation.
      tokenizer: file that replaces the checkpoint's own tokenizer.
    Raises:
      UserError: parts that do not fit together, or a workdir that exists.
    """
    decoder = decoder_model(source, segment_tokens, dtype, base.model)
    grafted = Grafted(decoder, Graft(decoder.join, is_silent=source.memory is None))
    if memory is not None:
        if source.memory is not None:
            raise UserError(f"{source.where}: it has a memory of its own, {decoder.memory.kind!r}; leave --memory out")
        grafted = graft(decoder, memory.model.memory, memory.model.join, layers)
    files = tokenizer_files(source, tokenizer)
    final = pathlib.Path(os.path.abspath(workdir)) / _FILES[files.kind]
    encoder = parse_tokenizer(files, source.spec.vocab_size, final, source.where)
    try:
        config = dataclasses.replace(
            base,
            name="imported" if memory is None else f"imported_{memory.name}",
            model=grafted.model,
            data=dataclasses.replace(base.data, tokenizer=encoder.config),
        )
    except ValueError as error:
        raise UserError(f"the imported model does not fit the rest of the run: {error}", status=1) from error
    origin = {
        "source": source.where,
        "max_tokens": source.spec.max_tokens,
        "memory": memory.name if memory is not None else decoder.memory.kind if source.memory else None,
        "starts_as_the_decoder": grafted.start.is_silent,
    }
    prepare_numbers(config.model.precision)
    with new_folder(workdir, "--workdir") as folder:
        for name, content in {**files.more, ORIGIN: (json.dumps(origin, indent=1) + "\n").encode()}.items():
            (folder / name).write_bytes(content)
        workdirs.claim(epath.Path(folder), config, encoder, exists=False)
        _write_checkpoint(folder, config, encoder, source, layout, grafted.start)
    return Imported(config, grafted.start, origin, _refusal(config, encoder))


def _refusal(config: RunConfig, encoder: FileTokenizer) -> str:
    """Why the run's data cannot be read with its tokenizer."""
    try:
        config.data.source.build(encoder, config.model.segment_tokens, config.data.seed)
    except UserError as error:
        return str(error)
    return ""


def _write_checkpoint(
    folder: pathlib.Path, config: RunConfig, encoder: FileTokenizer, source: Source, layout: Layout, start: Graft
) -> None:
    plan = make_plan(config, LanguageModel(config.model))
    shardings = plan.shardings(layout)
    workdirs.check_space(epath.Path(folder), config, plan.shapes)
    with layout.context(), Checkpoints(folder, config, encoder.fingerprint) as checkpoints:
        params = load_params(plan, shardings.params, source_reader(source), start.zeros)
        state = jax.jit(plan.first_state, out_shardings=shardings, donate_argnums=0)(params)
        checkpoints.save(0, state, None)
        checkpoints.finish()


def tokenizer_files(source: Source, path: pathlib.Path | None, option: str = "--tokenizer ") -> TokenizerFiles:
    """The tokenizer of a checkpoint.

    Args:
      source: the checkpoint.
      path: file that replaces its own tokenizer.
      option: what the user calls `path`, for messages.
    Raises:
      UserError: there is none.
    """
    if path is not None:
        if not path.is_file():
            raise UserError(f"{option}{path}: no such file; expected a tokenizer.json or a tokenizer.model")
        return TokenizerFiles("json" if path.suffix == ".json" else "sentencepiece", path.read_bytes(), None, {})
    files = source.tokenizer()
    if files is None:
        raise UserError(
            f"{source.where}: it has no tokenizer, which a run needs; give one with {option}PATH, a tokenizer.json or "
            "a tokenizer.model"
        )
    return files


def parse_tokenizer(files: TokenizerFiles, vocab_size: int, path: pathlib.Path, where: str) -> FileTokenizer:
    """The tokenizer of a checkpoint.

    Args:
      files: its content.
      vocab_size: of the model, which the tokenizer must not exceed.
      path: where the file will be.
      where: the checkpoint, for messages.
    """
    config = TokenizerConfig(kind=files.kind, path=str(path), eos=files.eos)
    encoder = TokenizerKind.find(files.kind).parse(files.content, config)
    if encoder.vocab_size > vocab_size:
        raise UserError(
            f"{where}: its tokenizer has {encoder.vocab_size} tokens, but the model has a vocabulary of {vocab_size}; "
            "give the tokenizer that the model was trained with, with --tokenizer",
            status=1,
        )
    return encoder
