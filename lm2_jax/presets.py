"""Presets by name."""

from lm2_jax.config import RunConfig
from lm2_jax.registry import near_misses


def preset(name: str) -> RunConfig:
    """The preset called `name`; KeyError with near misses for an unknown one."""
    from configs import PRESETS  # the experiments import this package

    if name not in PRESETS:
        raise KeyError(f"unknown preset {name!r}; known: {sorted(PRESETS)}.{near_misses(name, sorted(PRESETS))}")
    return PRESETS[name]
