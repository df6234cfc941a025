"""Presets: one experiment per file, collected here by name."""

from configs import tiny
from lm2_jax.config import RunConfig

PRESETS: dict[str, RunConfig] = {**tiny.PRESETS}
