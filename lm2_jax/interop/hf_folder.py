"""A Hugging Face folder: config.json, safetensors in one file or in shards, and the tokenizer's files."""

import json
import pathlib
from typing import Any

import numpy as np

from lm2_jax.errors import UserError
from lm2_jax.interop.architectures import architecture_of
from lm2_jax.interop.gpt2_names import Place, is_mask, with_prefix
from lm2_jax.interop.hf_config import DecoderSpec, read_hf_config
from lm2_jax.interop.names import Shapes
from lm2_jax.interop.safetensors_file import SafetensorsFile, Tensor
from lm2_jax.interop.source import Source, TokenizerFiles

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = {"tokenizer.json": "json", "tokenizer.model": "sentencepiece"}
EXTRA_FILES = ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "generation_config.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_BUFFERS = ("rotary_emb.inv_freq",)  # saved by old versions; they follow from the config


class HfFolder(Source):
    """See the module.

    Args:
      folder: path.
    Raises:
      UserError: a file is missing or damaged, or the model is not supported.
    """

    def __init__(self, folder: pathlib.Path):
        self.where, self.folder = str(folder), folder
        self.spec: DecoderSpec = read_hf_config(read_json(folder / CONFIG), str(folder / CONFIG))
        self._files = {self.plain_name(raw): (file, raw) for raw, file in self._open().items()}
        if self.spec.decoder.tie_head:  # some writers save the shared matrix twice
            self._files.pop("lm_head.weight", None)
        self._places = self._find_places()

    def plain_name(self, raw: str) -> str:
        """A tensor's name in the file without what a wrapper of the decoder adds to it."""
        return raw

    def _find_places(self) -> dict[str, Place]:
        """The place of each tensor in the files, by its common name; what is at no place keeps its own name."""
        architecture = architecture_of(self.spec.decoder)
        if architecture is None or architecture.places is None:
            return {name: Place(name) for name in self._files}
        self._files = {with_prefix(name): file for name, file in self._files.items() if not is_mask(name)}
        known = {name: p for name, p in architecture.places(self.spec.decoder).items() if p.name in self._files}
        used = {place.name for place in known.values()}
        return known | {name: Place(name) for name in self._files if name not in used}

    def _open(self) -> dict[str, SafetensorsFile]:
        """The file of each tensor."""
        if (self.folder / INDEX).exists():
            return self._open_shards()
        if not (self.folder / WEIGHTS).exists():
            self._refuse_missing()
        file = SafetensorsFile(self.folder / WEIGHTS)
        return {name: file for name in file.tensors if not name.endswith(_BUFFERS)}

    def _open_shards(self) -> dict[str, SafetensorsFile]:
        plain = read_json(self.folder / INDEX)
        places = plain.get("weight_map") if isinstance(plain, dict) else None
        if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
            raise UserError(f"{self.folder / INDEX}: damaged: expected a table 'weight_map' of file names", status=1)
        shards = sorted(set(places.values()))
        strange = [shard for shard in shards if pathlib.PurePath(shard).name != shard]
        if strange:
            raise UserError(f"{self.folder / INDEX}: names files outside the folder: {strange[:3]}", status=1)
        missing = [shard for shard in shards if not (self.folder / shard).exists()]
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:3])}; get the "
                "full checkpoint",
                status=1,
            )
        opened = {shard: SafetensorsFile(self.folder / shard) for shard in shards}
        absent = [name for name, shard in places.items() if name not in opened[shard].tensors]
        if absent:
            raise UserError(
                f"{self.folder / INDEX}: {absent[0]!r} should be in {places[absent[0]]}, which does not hold it",
                status=1,
            )
        return {name: opened[shard] for name, shard in places.items() if not name.endswith(_BUFFERS)}

    def _refuse_missing(self) -> None:
        pickles = sorted(path.name for pattern in _PICKLES for path in self.folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{self.folder}: its weights are pickles ({', '.join(pickles[:3])}), which can run any code when they "
                "are read. Convert to safetensors: load the model with transformers on a machine where that is safe, "
                "and save it with save_pretrained(folder, safe_serialization=True)",
                status=1,
            )
        raise UserError(f"{self.folder}: no weights there; expected {WEIGHTS} or {INDEX}", status=1)

    def shapes(self) -> Shapes:
        """See the base class."""
        return {name: place.shape(self._tensor(place.name).shape) for name, place in self._places.items()}

    def _tensor(self, name: str) -> Tensor:
        file, raw = self._files[name]
        return file.tensors[raw]

    def read(self, name: str) -> np.ndarray:
        """See the base class."""
        place = self._places[name]
        file, raw = self._files[place.name]
        return place.read(file.read(raw))

    def tokenizer(self) -> TokenizerFiles | None:
        """tokenizer.json, or else tokenizer.model."""
        for name, kind in TOKENIZERS.items():
            if (self.folder / name).exists():
                content = (self.folder / name).read_bytes()
                eos = token_name(content, self.spec.eos_id) if kind == "json" else None
                more = {extra: (self.folder / extra).read_bytes() for extra in EXTRA_FILES if self._has(extra)}
                return TokenizerFiles(kind, content, eos, more)
        return None

    def _has(self, name: str) -> bool:
        return (self.folder / name).exists()


def token_name(content: bytes, token: int | None) -> str | None:
    """The name of a token in a tokenizer.json; None where it has none."""
    if token is None:
        return None
    try:
        plain = json.loads(content)
        added = {entry["id"]: entry["content"] for entry in plain.get("added_tokens", ())}
        vocabulary = plain["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ()
    except (ValueError, TypeError, KeyError, AttributeError):
        return None  # the tokenizer's own reader says what is wrong with it
    return added.get(token) or next((name for name, index in pairs if index == token), None)


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file of a checkpoint."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; expected a Hugging Face model folder", status=1) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not a JSON file ({error})", status=1) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", status=1) from error
