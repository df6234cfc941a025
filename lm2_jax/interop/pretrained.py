"""`from_pretrained`: a model from a folder that `export_hf` wrote, from a Hugging Face model, or from another checkpoint."""

import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from lm2_jax.config import RunConfig
from lm2_jax.data.tokenizers import FileTokenizer, load_tokenizer
from lm2_jax.errors import UserError
from lm2_jax.interop import hub
from lm2_jax.interop.export import KEY
from lm2_jax.interop.hf_folder import CONFIG, TOKENIZERS, WEIGHTS, read_json
from lm2_jax.interop.load import Reader, load_params, source_reader
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.safetensors_file import SafetensorsFile
from lm2_jax.interop.workdir import decoder_model, parse_tokenizer
from lm2_jax.layout import Layout
from lm2_jax.model import LanguageModel
from lm2_jax.params import to_canonical
from lm2_jax.precision import FloatName, prepare_numbers
from lm2_jax.training.state import Plan, make_plan
from lm2_jax.training.workdir import config_of
from lm2_jax.types import PyTree


class Pretrained(NamedTuple):
    """Everything needed to use a model."""

    config: RunConfig
    model: LanguageModel
    params: Any
    tokenizer: FileTokenizer | None  # None: the checkpoint has none


def from_pretrained(
    path: str | os.PathLike[str],
    segment_tokens: int | None = None,
    dtype: FloatName | None = None,
    layout: Layout | None = None,
) -> Pretrained:
    """Reads a model.

    Args:
      path: folder or file of a checkpoint, or a name `owner/model` on the Hugging Face hub.
      segment_tokens: of a decoder without memory, the tokens within which it attends; None: 512, or fewer if the model
        was trained for fewer. A model with memory keeps its own.
      dtype: of parameters and computation; None: float32, or that of the run for a model with memory.
      layout: where the parameters are placed; None: on the first device.
    Raises:
      UserError: nothing there, a model that is not supported, or a damaged file.
    """
    name = os.fspath(path)
    folder = hub.fetch(name) if hub.is_hub_name(name) else pathlib.Path(name)
    if (folder / "checkpoints").exists():
        raise UserError(f"{name}: the workdir of a run; read it with lm2_jax.load_run({name!r})")
    own = read_json(folder / CONFIG) if folder.is_dir() and (folder / CONFIG).exists() else None
    if isinstance(own, dict) and KEY in own:
        return _read_own(folder, own, segment_tokens, dtype, layout)
    source = open_source(folder)
    model = decoder_model(source, segment_tokens, dtype or "float32")
    config = dataclasses.replace(RunConfig(), name="pretrained", model=model)
    files = source.tokenizer()
    tokenizer = None
    if files is not None:
        tokenizer = parse_tokenizer(files, source.spec.vocab_size, folder, source.where)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer.config))
    return _loaded(config, source_reader(source), tokenizer, layout)


def _read_own(
    folder: pathlib.Path,
    plain: dict[str, Any],
    segment_tokens: int | None,
    dtype: FloatName | None,
    layout: Layout | None,
) -> Pretrained:
    config = config_of(plain[KEY], str(folder / CONFIG))
    if segment_tokens not in (None, config.model.segment_tokens):
        raise UserError(
            f"{folder}: segment_tokens={segment_tokens}, but this model was trained with {config.model.segment_tokens}, "
            "which its memory depends on; leave segment_tokens out"
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

    has_tokenizer = any((folder / name).exists() for name in TOKENIZERS)
    tokenizer = load_tokenizer(folder, config.data.tokenizer) if has_tokenizer else None
    return _loaded(config, Reader(file.tensors.__contains__, read), tokenizer, layout)


def _loaded(config: RunConfig, reader: Reader, tokenizer: FileTokenizer | None, layout: Layout | None) -> Pretrained:
    prepare_numbers(config.model.precision)
    plan = make_plan(config, LanguageModel(config.model))
    if layout is None:
        params = load_params(plan, _on_first_device(plan), reader)
    else:
        with layout.context():
            params = load_params(plan, layout.shardings(plan.axes.params, plan.shapes.params), reader)
    return Pretrained(config, plan.model, params, tokenizer)


def _on_first_device(plan: Plan) -> PyTree:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: place, plan.shapes.params)
