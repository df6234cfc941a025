"""Finds out what kind of checkpoint a path or a name is."""

import os
import pathlib

from lm2_jax.errors import UserError
from lm2_jax.interop import hub
from lm2_jax.interop.gguf_file import GgufFile
from lm2_jax.interop.llama2c import Llama2cFile
from lm2_jax.interop.recurrent_folder import open_folder
from lm2_jax.interop.source import Source

_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
EXPECTED = (
    "expected a Hugging Face folder with config.json and safetensors, a .gguf file, a llama2.c .bin file, or a name "
    "owner/model on the hub"
)


def open_source(source: str | os.PathLike[str]) -> Source:
    """Opens a checkpoint and compares its tensors with its config; no tensor is read.

    Args:
      source: folder, file or name on the hub.
    Raises:
      UserError: nothing there, a kind that is not supported, or a damaged checkpoint.
    """
    name = os.fspath(source)
    path = hub.fetch(name) if hub.is_hub_name(name) else pathlib.Path(name)
    if not path.exists():
        raise UserError(f"{name}: no such file or folder; {EXPECTED}")
    opened = open_folder(path) if path.is_dir() else _open_file(path)
    opened.where = name
    opened.check()
    return opened


def _open_file(path: pathlib.Path) -> Source:
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", status=1) from error
    if start.startswith(_PICKLE_STARTS):
        raise UserError(
            f"{path}: a pickle, which can run any code when it is read. Convert to safetensors: load the model with "
            "transformers where that is safe, and save it with save_pretrained(folder, safe_serialization=True)",
            status=1,
        )
    if start == b"GGUF" or path.suffix == ".gguf":
        return GgufFile(path)
    if path.suffix == ".bin":
        return Llama2cFile(path)
    if path.suffix == ".safetensors":
        raise UserError(f"{path}: give the folder that holds this file and its config.json")
    raise UserError(f"{path}: not a checkpoint; {EXPECTED}")
