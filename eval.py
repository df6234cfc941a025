"""Evaluates a trained run: `python eval.py SUITE --workdir W [--mesh.* N] [--distributed]`; `--help` lists the suites.

A second call with the same arguments resumes an interrupted evaluation.
"""

import dataclasses
from typing import Annotated, Any

import jax
import tyro

from lm2_jax import RunConfig, UserError, cli
from lm2_jax.evaluation import SUITES
from lm2_jax.evaluation.suite import Suite
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.sharding.mesh import spare_threads
from lm2_jax.training.hosts import join_hosts

_MESH = "Devices along each mesh axis; prompts are split over data and fsdp. Results do not depend on it."
_DISTRIBUTED = "Joins the processes that run this command on the other hosts of a slice."


def command_of(suite: type[Suite]) -> type[Any]:
    """The command line of a suite: its own options, and the devices."""
    fields = [
        ("suite", Annotated[suite, tyro.conf.arg(name="")]),
        ("mesh", Annotated[MeshConfig, tyro.conf.arg(help=_MESH)], dataclasses.field(default=MeshConfig())),
        ("distributed", Annotated[bool, tyro.conf.arg(help=_DISTRIBUTED)], dataclasses.field(default=False)),
    ]
    command = dataclasses.make_dataclass(suite.__name__, fields, frozen=True)
    command.__doc__ = suite.__doc__
    return command


def main() -> None:
    """Parses the command line and runs the suite it names."""
    commands: dict[str, Any] = {kind: command_of(suite) for kind, suite in SUITES.items()}
    try:
        command: Any = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    except ValueError as error:  # a suite refuses the value of a field
        raise UserError(str(error)) from error
    spare_threads(jax.config.values["jax_num_cpu_devices"])
    if command.distributed:
        join_hosts()

    def layout_of(run: RunConfig) -> Layout:
        return Layout(make_mesh(command.mesh), config=run)

    is_single = jax.device_count() == 1 and command.mesh == MeshConfig()
    command.suite.main(None if is_single else layout_of)


if __name__ == "__main__":
    cli.run(main)
