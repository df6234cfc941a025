"""Presets: one experiment per file, collected here by name."""

from lm2_jax.config import RunConfig
from lm2_jax.presets import babilong_small, probe, probe_titans, published, quickstart, text, tiny, titans
from lm2_jax.registry import near_misses
from lm2_jax.sharding.mesh import MeshConfig

PRESETS: dict[str, RunConfig] = {
    **tiny.PRESETS,
    **quickstart.PRESETS,
    **text.PRESETS,
    **probe.PRESETS,
    **probe_titans.PRESETS,
    **babilong_small.PRESETS,
    **titans.PRESETS,
    **published.PRESETS,
}


def mesh_for(name: str, devices: int) -> MeshConfig:
    """The mesh that is noted for a preset on so many devices; where there is none, copies of the model."""
    return published.MESHES.get(name, {}).get(devices, MeshConfig())


def preset(name: str) -> RunConfig:
    """The preset called `name`; KeyError with near misses for an unknown one."""
    if name not in PRESETS:
        raise KeyError(f"unknown preset {name!r}; known: {sorted(PRESETS)}.{near_misses(name, sorted(PRESETS))}")
    return PRESETS[name]
