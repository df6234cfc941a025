"""Evaluates a trained run: `lm2 eval SUITE --workdir W [--option VALUE ...]`."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax

from lm2_jax import cli
from lm2_jax.commands import flags
from lm2_jax.commands.usage import show_help
from lm2_jax.config import RunConfig, from_dict
from lm2_jax.errors import UserError
from lm2_jax.evaluation import SUITES
from lm2_jax.folders import open_path
from lm2_jax.footprint import check_inference_memory
from lm2_jax.registry import near_misses
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.sharding.mesh import spare_threads
from lm2_jax.training.hosts import join_hosts
from lm2_jax.training.workdir import read_config


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Options of every suite."""

    mesh: MeshConfig = MeshConfig()
    """Devices along each axis of the mesh; prompts are split over data and fsdp. Results do not depend on it."""
    distributed: bool = False
    """Joins the processes that run this command on the other hosts of a slice."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and runs the suite that it names."""
    arguments = sys.argv[1:] if arguments is None else arguments
    wants_help = any(word in ("-h", "--help") for word in arguments)
    words, typed = flags.split([word for word in arguments if word not in ("-h", "--help")])
    program = cli.program("eval")
    if not words:
        listed = "\n".join(
            f"  {name:<12} {(suite.__doc__ or '').partition(chr(10))[0]}" for name, suite in SUITES.items()
        )
        if wants_help:
            print(
                f"Evaluates a trained run: `{program} SUITE --workdir W [--option VALUE ...]`\n"
                f"`{program} SUITE --help` lists options.\n\n{listed}"
            )
            return
        raise UserError(f"expected a suite, as in `{program} babilong --workdir W`:\n{listed}")
    if words[0] not in SUITES or len(words) > 1:
        raise UserError(f"unknown suite {' '.join(words)!r}.{near_misses(words[0], SUITES)} Known: {sorted(SUITES)}")
    suite_class = SUITES[words[0]]
    table, options_table = flags.default_table(suite_class), flags.default_table(EvalOptions)
    roots = [(suite_class, table), (EvalOptions, options_table)]
    if wants_help:
        show_help(f"{program} {words[0]} [--option VALUE ...]", roots, flags.apply_all(roots, typed))
        return
    flags.apply(roots, typed)
    suite = from_dict(suite_class, table, "", flags.FLAGS)
    _evaluate(suite, from_dict(EvalOptions, options_table, "", flags.FLAGS))


def _evaluate(suite: Any, options: EvalOptions) -> None:
    spare_threads(jax.config.values["jax_num_cpu_devices"])
    if options.distributed:
        join_hosts()
    for workdir in suite.evaluated():
        check_inference_memory(read_config(open_path(workdir, "workdir")), jax.devices())
    if jax.device_count() == 1 and options.mesh == MeshConfig():
        suite.main()
        return
    mesh = make_mesh(options.mesh)

    def layout_of(run: RunConfig) -> Layout:
        return Layout(mesh, config=run)

    suite.main(layout_of)
