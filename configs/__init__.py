"""Presets: one experiment per file, collected here by name."""

from types import ModuleType
from typing import NamedTuple

from lm2_jax.config import RunConfig
from lm2_jax.presets import (
    babilong_published,
    babilong_small,
    probe,
    probe_methods,
    probe_titans,
    published,
    quickstart,
    text,
    tiny,
    titans,
)
from lm2_jax.registry import near_misses
from lm2_jax.sharding.mesh import MeshConfig


class PresetFamily(NamedTuple):
    """The presets of one file; it has `PRESETS`, and for the list `HARDWARE` and `PURPOSES`."""

    module: ModuleType

    @property
    def title(self) -> str:
        """Name of the file."""
        return self.module.__name__.rpartition(".")[2]

    @property
    def presets(self) -> dict[str, RunConfig]:
        """Name -> run."""
        return self.module.PRESETS

    @property
    def hardware(self) -> str:
        """What its presets need."""
        return getattr(self.module, "HARDWARE", "any")

    def purpose(self, name: str) -> str:
        """What a preset is for; where its file does not say, its memory and join."""
        model = self.presets[name].model
        default = f"memory {model.memory.kind!r} with join {model.join.kind!r}"
        return getattr(self.module, "PURPOSES", {}).get(name, default)


MODULES = (
    tiny,
    quickstart,
    text,
    probe,
    probe_titans,
    probe_methods,
    babilong_small,
    titans,
    published,
    babilong_published,
)
FAMILIES = tuple(PresetFamily(module) for module in MODULES)
PRESETS: dict[str, RunConfig] = {name: run for family in FAMILIES for name, run in family.presets.items()}


def mesh_for(name: str, devices: int) -> MeshConfig:
    """The mesh recorded for a preset and a number of devices; else data parallelism alone."""
    return published.MESHES.get(name, {}).get(devices, MeshConfig())


def preset(name: str) -> RunConfig:
    """The preset called `name`; KeyError with near misses for an unknown one."""
    if name not in PRESETS:
        raise KeyError(f"unknown preset {name!r}.{near_misses(name, PRESETS)} Known: {sorted(PRESETS)}")
    return PRESETS[name]
