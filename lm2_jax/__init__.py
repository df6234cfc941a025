"""Language models with a recurrent memory, in JAX and Flax linen.

    run = lm2_jax.load_run("runs/quickstart")            # .config .model .params .tokenizer .step
    run = lm2_jax.from_pretrained("folder")              # the same, from a Hugging Face folder or an export
    config = lm2_jax.preset("lm2_tiny")                  # a RunConfig
    model = lm2_jax.build_model(config.model)            # a flax.linen.Module
    state = model.init_state(batch=2)
    logits, state = model.apply({"params": params}, tokens, state)
    logits, state = lm2_jax.stream(model, params, tokens, state)

Names are resolved at first use, so `import lm2_jax` itself loads none of the libraries that data and training need.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lm2_jax import babilong as babilong
    from lm2_jax import memory as memory
    from lm2_jax.config import ModelConfig as ModelConfig
    from lm2_jax.config import RunConfig as RunConfig
    from lm2_jax.errors import UserError as UserError
    from lm2_jax.interop.pretrained import from_pretrained as from_pretrained
    from lm2_jax.memory_file import load_memory as load_memory
    from lm2_jax.model import LanguageModel as LanguageModel
    from lm2_jax.presets import PRESETS as PRESETS
    from lm2_jax.presets import preset as preset
    from lm2_jax.runs import Run as Run
    from lm2_jax.runs import load_run as load_run
    from lm2_jax.streaming import absorb as absorb
    from lm2_jax.streaming import stream as stream

_MODULES = ("babilong", "memory")
_NAMES = {
    "LanguageModel": "lm2_jax.model",
    "ModelConfig": "lm2_jax.config",
    "PRESETS": "lm2_jax.presets",
    "Run": "lm2_jax.runs",
    "RunConfig": "lm2_jax.config",
    "UserError": "lm2_jax.errors",
    "absorb": "lm2_jax.streaming",
    "from_pretrained": "lm2_jax.interop.pretrained",
    "load_memory": "lm2_jax.memory_file",
    "load_run": "lm2_jax.runs",
    "preset": "lm2_jax.presets",
    "stream": "lm2_jax.streaming",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"lm2_jax.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'lm2_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_NAMES})


def build_model(config: "ModelConfig") -> "LanguageModel":
    """The flax module of a model config."""
    from lm2_jax.model import LanguageModel

    return LanguageModel(config)
