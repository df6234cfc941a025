"""The two small models of the demonstration, and how their folders are made from trained runs.

python -m lm2_jax.demo.models runs/demo/lm2 runs/demo/none
"""

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence

import jax
import numpy as np
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from lm2_jax import cli
from lm2_jax.config import RunConfig, from_dict, to_dict
from lm2_jax.data.tokenizers import TokenizerConfig, load_tokenizer
from lm2_jax.errors import UserError
from lm2_jax.model import LanguageModel
from lm2_jax.params import from_canonical, to_canonical
from lm2_jax.runs import Run, load_run

FOLDER = pathlib.Path(__file__).parent
MODELS = {"lm2": "LM2", "none": "baseline without memory"}
_CONFIG, _PARAMS, _TOKENIZER = "config.json", "params.safetensors", "tokenizer.json"


def load_model(name: str) -> Run:
    """One of `MODELS` as a run."""
    folder = FOLDER / name
    table = json.loads((folder / _CONFIG).read_text())
    step = table.pop("step")
    config = from_dict(RunConfig, table)
    model = LanguageModel(config.model)
    tokens = np.zeros((1, config.model.segment_tokens), np.int32)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, model.init_state(1)))
    params = from_canonical(load_file(folder / _PARAMS), nn.unbox(variables)["params"])
    return Run(config, model, params, load_tokenizer(FOLDER / "lm2", config.data.tokenizer), step)


def store_model(name: str, workdir: str) -> None:
    """Writes the folder of a model; both models have the tokenizer of the first one."""
    run, folder = load_run(workdir), FOLDER / name
    folder.mkdir(exist_ok=True)
    data = dataclasses.replace(run.config.data, tokenizer=TokenizerConfig())
    config = dataclasses.replace(run.config, data=data)
    (folder / _CONFIG).write_text(json.dumps(to_dict(config) | {"step": int(run.step)}, indent=1) + "\n")
    arrays = {path: np.ascontiguousarray(array) for path, array in to_canonical(nn.unbox(run.params)).items()}
    save_file(arrays, folder / _PARAMS)
    if name == "lm2":
        shutil.copyfile(pathlib.Path(workdir) / _TOKENIZER, folder / _TOKENIZER)
    elif run.tokenizer.fingerprint != load_tokenizer(FOLDER / "lm2").fingerprint:
        raise UserError(f"{workdir}: its tokenizer is not that of the first workdir")


def main(arguments: Sequence[str] | None = None) -> None:
    """Stores both models."""
    workdirs = sys.argv[1:] if arguments is None else arguments
    if len(workdirs) != len(MODELS):
        raise UserError(f"expected two workdirs, of {' and '.join(MODELS)}; got {len(workdirs)}")
    for name, workdir in zip(MODELS, workdirs, strict=True):
        store_model(name, workdir)


if __name__ == "__main__":
    cli.run(main)
