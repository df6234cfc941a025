"""Models by their name on the Hugging Face hub, through the `huggingface_hub` package and its cache."""

import os
import pathlib
import re

from lm2_jax.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Pickles and code are never fetched.
_FILES = ["config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer*", "*.jinja", "README.md"]
_FILES += ["special_tokens_map.json", "generation_config.json"]


def is_hub_name(name: str) -> bool:
    """Whether a source is `owner/model` and no path on this machine."""
    return _NAME.fullmatch(name) is not None and not os.path.exists(name)


def fetch(name: str) -> pathlib.Path:
    """The folder with the files of a model, from the cache or the network.

    Args:
      name: `owner/model`.
    Raises:
      UserError: without the package, without a network, or for a name that the hub does not know.
    """
    advice = f"{name!r} is no path on this machine, so it is taken for a name on the Hugging Face hub"
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{advice}, which needs the package huggingface_hub: pip install huggingface_hub, or give a local folder"
        ) from error
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # the package raises those of several HTTP libraries
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{advice}, but it cannot be fetched: {lines[0][:200]}. Check the name and the network, or give a local "
            "folder",
            status=1,
        ) from error
