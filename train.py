"""Trains a preset: `python train.py PRESET [--workdir W] [--mesh.data N ...] [--section.field VALUE ...]`.

A second call with the same workdir goes on where the first one stopped.
"""

import dataclasses
import sys
from typing import Annotated

import tyro

from lm2_jax import PRESETS, RunConfig, UserError, cli
from lm2_jax.registry import near_misses
from lm2_jax.training.fit import fit
from sharding import Layout, MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line sets."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The run: model, data, loss, optim, train, checkpoint."""
    workdir: str | None = None
    """Folder or bucket (gs://...) of the run; None: runs/PRESET. A run that is there already goes on."""
    mesh: MeshConfig = MeshConfig()
    """How devices are shared out."""


def main() -> None:
    """Parses the command line and trains."""
    names = [word for word in sys.argv[1:2] if not word.startswith("-")]
    if names and names[0] not in PRESETS:
        known = sorted(PRESETS)
        raise UserError(f"unknown preset {names[0]!r}; known: {', '.join(known)}.{near_misses(names[0], known)}")
    presets = {name: (f"Trains {name}.", Command(run)) for name, run in PRESETS.items()}
    command = tyro.extras.overridable_config_cli(presets, description=__doc__)
    workdir = command.workdir or f"runs/{command.run.name}"
    outcome = fit(command.run, workdir, Layout(make_mesh(command.mesh)))
    sys.exit(outcome.status)


if __name__ == "__main__":
    cli.run(main)
