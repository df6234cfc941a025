"""Trained models as folders for other people: a Hugging Face model, or safetensors with canonical names.

A decoder without memory becomes a folder that `transformers` loads. A model with memory has no class there: its folder
holds the parameters by the names of `lm2_jax.params`, the run's config, and a model card.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lm2_jax import formats
from lm2_jax.config import ModelConfig, to_dict
from lm2_jax.interop.architectures import architecture_of
from lm2_jax.interop.gpt2_names import in_files
from lm2_jax.interop.hf_config import DecoderSpec, write_hf_config
from lm2_jax.interop.hf_folder import CONFIG, EXTRA_FILES, INDEX, WEIGHTS
from lm2_jax.interop.load import array_reader
from lm2_jax.interop.lora import merge_lora
from lm2_jax.interop.model_card import model_card
from lm2_jax.interop.names import Shapes, hf_name, hf_shapes, to_hf
from lm2_jax.interop.new_folder import new_folder
from lm2_jax.interop.safetensors_file import write_safetensors
from lm2_jax.interop.workdir import ORIGIN
from lm2_jax.params import to_canonical
from lm2_jax.runs import Run, load_run

KEY = "lm2_jax"  # in config.json: the run's config; no Hugging Face model has it
SHARD_BYTES = 5_000_000_000


def is_plain(model: ModelConfig) -> bool:
    """Whether `transformers` has the model: no memory, persistent tokens or attention window, and a known decoder."""
    has_class = architecture_of(model.decoder) is not None and model.decoder.window_tokens in (None, 0)
    return has_class and not model.has_memory and model.join.persistent_tokens() == 0


def export_workdir(workdir: str | os.PathLike[str], out: str | os.PathLike[str], shard_bytes: int = SHARD_BYTES) -> str:
    """Writes the newest parameters of a run as a new folder, which appears when all of it is written.

    Args:
      workdir: of the run.
      out: the new folder.
      shard_bytes: most bytes of tensors in one file of a Hugging Face model.
    Returns:
      A sentence that says what was written.
    Raises:
      UserError: no such run, or a folder that exists.
    """
    run = merge_lora(load_run(workdir))
    origin = read_origin(workdir)
    with new_folder(out, "--out") as folder:
        plain = is_plain(run.config.model)
        if plain:
            _write_hf(run, folder, origin, shard_bytes)
        else:
            _write_own(run, folder)
        (folder / run.tokenizer.file_name).write_bytes(run.tokenizer.serialized())
        for name in EXTRA_FILES:
            extra = pathlib.Path(workdir) / name
            if name != "generation_config.json" and extra.exists():
                (folder / name).write_bytes(extra.read_bytes())
        (folder / "README.md").write_text(model_card(run, workdir, origin, plain), encoding="utf-8")
    kind = "a Hugging Face model" if plain else "safetensors with canonical names"
    return f"{out}: {kind}, step {run.step} of {workdir}; read it with lm2_jax.from_pretrained({os.fspath(out)!r})"


def read_origin(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Where an imported run comes from; empty for a run that was trained from scratch."""
    path = pathlib.Path(workdir) / ORIGIN
    try:
        plain = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return plain if isinstance(plain, dict) else {}


def _write_hf(run: Run, folder: pathlib.Path, origin: Mapping[str, Any], shard_bytes: int) -> None:
    model, read = run.config.model, array_reader(run.params)
    shapes = hf_shapes(model.decoder, model.vocab_size)
    dtype = np.dtype(jax.tree.leaves(run.params)[0].dtype)
    ours = {hf_name(name): name for name in to_canonical(jax.eval_shape(lambda: run.params))}

    def tensor(name: str) -> np.ndarray:
        canonical = ours[name]
        return to_hf(canonical, read(canonical), shapes[name])

    architecture = architecture_of(model.decoder)
    assert architecture is not None
    places = {} if architecture.places is None else architecture.places(model.decoder)
    _write_shards(folder, *in_files(places, shapes, tensor), dtype, shard_bytes)
    longest = origin.get("max_tokens") or model.decoder.max_tokens or model.segment_tokens
    spec = DecoderSpec(model.decoder, model.vocab_size, longest, run.tokenizer.eos_id)
    _write_json(folder / CONFIG, write_hf_config(spec, dtype.name))
    _write_json(folder / "generation_config.json", {"eos_token_id": spec.eos_id, "pad_token_id": run.tokenizer.pad_id})


def _write_shards(
    folder: pathlib.Path, shapes: Shapes, read: Callable[[str], np.ndarray], dtype: np.dtype, shard_bytes: int
) -> None:
    """One file, or several with an index."""
    shards: list[dict[str, tuple[tuple[int, ...], np.dtype]]] = [{}]
    sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, shape in shapes.items()}
    used = 0
    for name, shape in shapes.items():
        if shards[-1] and used + sizes[name] > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = (shape, dtype)
        used += sizes[name]
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, shards[0], read, {"format": "pt"})
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, read, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})


def _write_own(run: Run, folder: pathlib.Path) -> None:
    read = array_reader(run.params)
    named = to_canonical(jax.eval_shape(lambda: run.params))
    shapes = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in named.items()}
    write_safetensors(folder / WEIGHTS, shapes, read, {"format": "lm2_jax"})
    plain = {"model_type": KEY, "step": run.step, KEY: {**formats.stamp(), **to_dict(run.config)}}
    _write_json(folder / CONFIG, plain)


def _write_json(path: pathlib.Path, plain: dict[str, Any]) -> None:
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
