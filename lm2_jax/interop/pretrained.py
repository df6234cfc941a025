"""`from_pretrained`: a run from an exported folder, a Hugging Face model, another checkpoint, or a workdir."""

import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from lm2_jax.checkpoint import FOLDER
from lm2_jax.config import ModelConfig, RunConfig
from lm2_jax.data.tokenizers import load_tokenizer
from lm2_jax.errors import UserError
from lm2_jax.interop import hub
from lm2_jax.interop.export import KEY
from lm2_jax.interop.hf_folder import CONFIG, WEIGHTS, read_json
from lm2_jax.interop.load import Reader, load_params, source_reader
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.safetensors_file import SafetensorsFile
from lm2_jax.interop.source import Source
from lm2_jax.interop.workdir import decoder_model, parse_tokenizer, tokenizer_files
from lm2_jax.layout import Layout
from lm2_jax.model import LanguageModel
from lm2_jax.params import to_canonical
from lm2_jax.precision import FloatName, prepare_numbers
from lm2_jax.runs import Run, load_run
from lm2_jax.training.state import make_plan
from lm2_jax.training.workdir import config_of
from lm2_jax.types import PyTree


class Decoder(NamedTuple):
    """A decoder without its tokenizer."""

    config: ModelConfig
    model: LanguageModel
    params: PyTree


def from_pretrained(
    path: str | os.PathLike[str],
    segment_tokens: int | None = None,
    dtype: FloatName | None = None,
    layout: Layout | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Run:
    """Reads a model; the result is that of `load_run`.

    Args:
      path: folder or file of a checkpoint, a name `owner/model` on the Hugging Face hub, or the workdir of a run.
      segment_tokens: of a decoder without memory, the tokens within which it attends; None: 512, or fewer if the model
        was trained for fewer. Other models keep their own.
      dtype: of parameters and computation of a checkpoint; None: float32, or that of the run for a model of ours.
      layout: where the parameters are placed; None: on the first device.
      tokenizer: tokenizer.json or tokenizer.model in place of the checkpoint's own.
    Raises:
      UserError: nothing there, a model that is not supported, a damaged file, or no tokenizer.
    """
    name, folder = os.fspath(path), locate(path)
    if (folder / FOLDER).exists():
        if (segment_tokens, dtype, tokenizer) != (None, None, None):
            raise UserError(
                f"{name}: the workdir of a run, which has its own segments, number types and tokenizer; leave "
                "segment_tokens, dtype and tokenizer out"
            )
        return load_run(name, layout)
    own = own_config(folder)
    if own is not None:
        return _read_own(folder, own, segment_tokens, dtype, layout)
    source = open_source(folder)
    files = tokenizer_files(source, None if tokenizer is None else pathlib.Path(tokenizer), "tokenizer=")
    encoder = parse_tokenizer(files, source.spec.vocab_size, folder, name)
    decoder = read_decoder(source, segment_tokens, dtype or "float32", layout)
    config = dataclasses.replace(RunConfig(), name="pretrained", model=decoder.config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=encoder.config))
    return Run(config, decoder.model, decoder.params, encoder, 0)


def locate(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path itself, or the folder with the files of a name on the hub."""
    name = os.fspath(path)
    return hub.fetch(name) if hub.is_hub_name(name) else pathlib.Path(name)


def own_config(folder: pathlib.Path) -> RunConfig | None:
    """The config of a run that `export_hf` wrote with its memory; None for any other folder or file."""
    plain = read_json(folder / CONFIG) if folder.is_dir() and (folder / CONFIG).exists() else None
    return config_of(plain[KEY], str(folder / CONFIG)) if isinstance(plain, dict) and KEY in plain else None


def read_decoder(
    source: Source, segment_tokens: int | None = None, dtype: FloatName = "float32", layout: Layout | None = None
) -> Decoder:
    """Reads the decoder of a checkpoint, which needs no tokenizer; arguments as of `from_pretrained`."""
    config = dataclasses.replace(RunConfig(), model=decoder_model(source, segment_tokens, dtype))
    model, params = _loaded(config, source_reader(source), layout)
    return Decoder(config.model, model, params)


def _read_own(
    folder: pathlib.Path,
    config: RunConfig,
    segment_tokens: int | None,
    dtype: FloatName | None,
    layout: Layout | None,
) -> Run:
    if segment_tokens not in (None, config.model.segment_tokens):
        raise UserError(
            f"{folder}: segment_tokens={segment_tokens}, but this model was trained with "
            f"{config.model.segment_tokens}, which its memory depends on; leave segment_tokens out"
        )
    if dtype is not None:
        precision = dataclasses.replace(config.model.precision, params=dtype, compute=dtype)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, precision=precision))
    file = SafetensorsFile(folder / WEIGHTS)
    names = to_canonical(make_plan(config, LanguageModel(config.model)).shapes.params)
    problems = [f"{name}: missing" for name in names if name not in file.tensors]
    problems += [f"{name}: the model has no such parameter" for name in file.tensors if name not in names]
    problems += [
        f"{name}: expected shape {list(leaf.shape)}, got {list(file.tensors[name].shape)}"
        for name, leaf in names.items()
        if name in file.tensors and tuple(leaf.shape) != file.tensors[name].shape
    ]
    if problems:
        raise UserError(f"{file.path} does not fit {CONFIG}:\n  " + "\n  ".join(problems[:8]), status=1)

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return file.read(name).reshape(shape)

    model, params = _loaded(config, Reader(file.tensors.__contains__, read), layout)
    step = read_json(folder / CONFIG).get("step")
    tokenizer = load_tokenizer(folder, config.data.tokenizer)
    return Run(config, model, params, tokenizer, step if isinstance(step, int) else 0)


def _loaded(config: RunConfig, reader: Reader, layout: Layout | None) -> tuple[LanguageModel, PyTree]:
    prepare_numbers(config.model.precision)
    plan = make_plan(config, LanguageModel(config.model))
    if layout is None:
        place: Any = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return plan.model, load_params(plan, jax.tree.map(lambda _: place, plan.shapes.params), reader)
    with layout.context():
        return plan.model, load_params(plan, layout.shardings(plan.axes.params, plan.shapes.params), reader)
