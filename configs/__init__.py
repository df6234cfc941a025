"""Presets: one experiment per file, collected here by name."""

from configs import quickstart, tiny
from lm2_jax.config import RunConfig

PRESETS: dict[str, RunConfig] = {**tiny.PRESETS, **quickstart.PRESETS}
