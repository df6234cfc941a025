"""Presets: one experiment per file, collected here by name."""

from configs import babilong_small, probe, quickstart, tiny, titans
from lm2_jax.config import RunConfig

PRESETS: dict[str, RunConfig] = {
    **tiny.PRESETS,
    **quickstart.PRESETS,
    **probe.PRESETS,
    **babilong_small.PRESETS,
    **titans.PRESETS,
}
