"""Presets: one experiment per file, collected here by name."""

from configs import babilong_small, probe, probe_titans, published, quickstart, tiny, titans
from lm2_jax.config import RunConfig
from sharding.mesh import MeshConfig

PRESETS: dict[str, RunConfig] = {
    **tiny.PRESETS,
    **quickstart.PRESETS,
    **probe.PRESETS,
    **probe_titans.PRESETS,
    **babilong_small.PRESETS,
    **titans.PRESETS,
    **published.PRESETS,
}


def mesh_for(name: str, devices: int) -> MeshConfig:
    """The mesh that is noted for a preset on so many devices; where there is none, copies of the model."""
    return published.MESHES.get(name, {}).get(devices, MeshConfig())
