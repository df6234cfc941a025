"""Trains a preset: `python train.py PRESET [--workdir W] [--mesh.data N ...] [--section.field VALUE ...]`.

A second call with the same workdir goes on where the first one stopped. With --compile-only the train step is compiled
for a TPU slice, on any machine, and what it costs is printed.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the work begins, Ctrl-C ends the process without a traceback

import dataclasses
import os
import sys
from typing import Annotated

import jax
import tyro

from lm2_jax import PRESETS, RunConfig, UserError, cli
from lm2_jax.aot.compile_only import CompileConfig, compile_and_report
from lm2_jax.presets import mesh_for
from lm2_jax.registry import near_misses
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.sharding.mesh import spare_threads
from lm2_jax.sharding.plan import describe_plan
from lm2_jax.training.fit import fit
from lm2_jax.training.hosts import join_hosts
from lm2_jax.training.profile import ProfileConfig


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line sets."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The run: model, data, loss, optim, train, checkpoint."""
    compilation: Annotated[CompileConfig, tyro.conf.arg(name="")] = CompileConfig()
    """Costs instead of training."""
    profiling: Annotated[ProfileConfig, tyro.conf.arg(name="")] = ProfileConfig()
    """A trace of some steps."""
    plan: bool = False
    """Prints where each array would lie on --mesh, of which -1 counts as 1, and trains nothing; needs no devices."""
    distributed: bool = False
    """Joins the processes that run this command on the other hosts of a slice."""
    workdir: str | None = None
    """Folder or bucket (gs://...) of the run; None: runs/PRESET. A run that is there already goes on."""
    mesh: MeshConfig = MeshConfig()
    """How devices are shared out; where nothing is said, as configs/ notes for this preset and number of devices."""


def main() -> None:
    """Parses the command line and trains."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    names = [word for word in sys.argv[1:2] if not word.startswith("-")]
    if names and names[0] not in PRESETS:
        known = sorted(PRESETS)
        raise UserError(f"unknown preset {names[0]!r}; known: {', '.join(known)}.{near_misses(names[0], known)}")
    presets = {name: (f"Trains {name}.", Command(run)) for name, run in PRESETS.items()}
    command = tyro.extras.overridable_config_cli(presets, description=__doc__)

    is_said = any(word.startswith("--mesh.") for word in sys.argv[1:])  # a mesh may be asked for that is the default

    def mesh(devices: int) -> MeshConfig:
        return command.mesh if is_said else mesh_for(command.run.name, devices)

    if command.compilation.is_requested():
        status = compile_and_report(command.run, mesh, command.compilation)
        sys.stdout.flush()
        os._exit(status)  # the compiler may still be at work, see --quick
    if command.plan:
        print(describe_plan(command.run, command.mesh))
        return
    spare_threads(jax.config.values["jax_num_cpu_devices"])
    if command.distributed:
        join_hosts()
    workdir = command.workdir or f"runs/{command.run.name}"
    layout = Layout(make_mesh(mesh(jax.device_count())), config=command.run)
    outcome = fit(command.run, workdir, layout, command.profiling)
    sys.exit(outcome.status)


if __name__ == "__main__":
    cli.run(main)
