"""Language models with a recurrent memory, in JAX and Flax linen."""

import importlib
from typing import TYPE_CHECKING, Any

from lm2_jax import babilong as babilong
from lm2_jax import memory as memory
from lm2_jax.config import ModelConfig as ModelConfig
from lm2_jax.config import RunConfig as RunConfig
from lm2_jax.errors import UserError as UserError
from lm2_jax.model import LanguageModel as LanguageModel
from lm2_jax.streaming import absorb as absorb
from lm2_jax.streaming import stream as stream

if TYPE_CHECKING:
    from lm2_jax.memory_file import load_memory as load_memory
    from lm2_jax.presets import PRESETS as PRESETS
    from lm2_jax.presets import preset as preset
    from lm2_jax.runs import Run as Run
    from lm2_jax.runs import load_run as load_run

# Names that read files or import the trainer: resolved at first use.
_LAZY = {
    "PRESETS": "lm2_jax.presets",
    "preset": "lm2_jax.presets",
    "load_run": "lm2_jax.runs",
    "Run": "lm2_jax.runs",
    "load_memory": "lm2_jax.memory_file",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lm2_jax' has no attribute {name!r}")


def build_model(config: ModelConfig) -> LanguageModel:
    """The flax module of a model config."""
    return LanguageModel(config)
