"""Trains a preset, or resumes a run: `lm2 train PRESET [--workdir W] [--section.field VALUE ...]`."""

import contextlib
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
from etils import epath

from lm2_jax import cli
from lm2_jax.aot.compile_only import CompileConfig, compile_and_report
from lm2_jax.checkpoint import saved_steps
from lm2_jax.commands import files, flags, joins
from lm2_jax.commands.flags import Bare, Flag, Flat
from lm2_jax.config import RunConfig, from_dict, to_dict
from lm2_jax.errors import UserError
from lm2_jax.footprint import check_memory
from lm2_jax.interop.first_weights import check_first_weights
from lm2_jax.presets import PRESETS, mesh_for
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.sharding.mesh import spare_threads
from lm2_jax.sharding.plan import describe_plan
from lm2_jax.training.fit import fit
from lm2_jax.training.hosts import join_hosts
from lm2_jax.training.profile import ProfileConfig

HELP = ("-h", "--help")
INTRODUCTION = """\
Trains a preset, or resumes a run: `{train} PRESET [--workdir W] [--section.field VALUE ...]`.

    {train} --list                                       presets by family
    {train} PRESET --help                                every option, the most used first
    {train} PRESET --text PATH                           trains on your own text
    {train} PRESET --model.memory titans --model.join context
    {train} --config runs/a/config.json --workdir runs/b

The same command again resumes the run of its workdir. With --compile-only the train step is compiled for a TPU slice,
on any machine, and its costs are printed.
"""


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where a new run takes its first weights from."""

    from_: str | None = None
    """Where a new run takes its first weights from: the workdir of another run, a Hugging Face folder or name, a GGUF
    or llama2.c file. Step, optimizer and data start anew; a run that is resumed ignores it."""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What the command line sets besides the run."""

    workdir: str | None = None
    """Folder or bucket (gs://...) of the run; None: runs/NAME. A run that is already there is resumed."""
    text: str | None = None
    """Your own text to train on: a file, a folder, a JSONL file or a glob; tokenizer and sizes are chosen for it."""
    config: str | None = None
    """JSON or YAML file with fields of the run, all or some, such as another run's config.json."""
    dump_config: Annotated[str | None, Bare("-")] = None
    """Writes the run's config as JSON to this file (without a value: to the screen) and trains nothing."""
    init: InitConfig = InitConfig()
    """The first weights."""
    overwrite: bool = False
    """Replaces the run in the workdir, after a question. The old run is kept in WORKDIR/.replaced until the new one
    ends without an error, and comes back where the new one ends before its first checkpoint."""
    yes: bool = False
    """Answers the question of --overwrite."""
    plan: bool = False
    """Prints how each array is sharded on --mesh (a size of -1 counts as 1) and trains nothing; needs no devices."""
    distributed: bool = False
    """Joins the processes that run this command on the other hosts of a slice."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis of the mesh; without any --mesh option, as configs/ records for the preset."""
    compilation: Annotated[CompileConfig, Flat()] = CompileConfig()
    """Costs instead of training."""
    profiling: Annotated[ProfileConfig, Flat()] = ProfileConfig()
    """A trace of some steps."""


class Command(NamedTuple):
    """What a command line asks for."""

    run: RunConfig
    options: TrainOptions
    mesh_is_set: bool  # even to the default


def parse(arguments: Sequence[str]) -> Command | None:
    """The run and the options of a command line; None where it only asks for help or the list, which is printed.

    Raises:
      UserError: an unknown preset or option, a value that is none, or fields that do not go together; after the help,
        too, if it was asked for with such options.
    """
    wants_help = any(word in HELP for word in arguments)
    words, typed = flags.split([word for word in arguments if word not in HELP])
    program = cli.program("train")
    if any(flag.name == "list" for flag in typed):
        return _show_list()
    if len(words) > 1:
        raise UserError(f"expected one preset, got {' '.join(words)}; options begin with --")
    if wants_help and not words:
        from lm2_jax.commands.overview import names_by_family

        print(INTRODUCTION.format(train=program))
        print(f"Presets by family:\n{names_by_family()}\n\nPRESET --help shows the options.")
        return None
    table, options = _start(words, typed), flags.default_table(TrainOptions)
    roots = [(RunConfig, table), (TrainOptions, options)]
    chooses_memory = any(flag.name == "model.memory" for flag in typed)
    chooses_join = any(flag.name == "model.join" for flag in typed)
    if wants_help:
        from lm2_jax.commands.usage import show_help

        problems = flags.apply_all(roots, typed)
        if chooses_memory and not chooses_join:
            with contextlib.suppress(UserError):  # several joins fit: the options of the memory are shown all the same
                joins.choose_join(table["model"])
        show_help(f"{program} {' '.join(words)} [--option VALUE ...]", roots, problems)
        return None
    flags.apply(roots, typed)
    if chooses_memory and not chooses_join:
        joins.choose_join(table["model"])
    run = from_dict(RunConfig, table, "", flags.FLAGS)
    return Command(
        run, from_dict(TrainOptions, options, "", flags.FLAGS), any(flag.name.startswith("mesh.") for flag in typed)
    )


def _show_list() -> None:
    from lm2_jax.commands import overview

    print(overview.table())


def _start(words: Sequence[str], typed: Sequence[Flag]) -> dict[str, Any]:
    """The table that flags change: of the preset, of --text, and of the file of --config."""
    preset, text, config = words[0] if words else None, _last(typed, "text"), _last(typed, "config")
    if preset is None and config is None:
        train = cli.program("train")
        raise UserError(f"expected a preset, as in `{train} quickstart`; `{train} --list` shows all")
    if preset is not None and preset not in PRESETS:
        from lm2_jax.commands.overview import unknown_preset

        raise UserError(unknown_preset(preset))
    table = None if preset is None else to_dict(PRESETS[preset])
    if text is not None and table is not None:
        table = _with_text(table, text)
    if config is not None:
        table = files.config_table(config, table)
    assert table is not None
    return _with_text(table, text) if text is not None and preset is None else table


def _with_text(table: dict[str, Any], path: str) -> dict[str, Any]:
    """The table of a run changed so that it trains on a person's own text."""
    return to_dict(own_text()(from_dict(RunConfig, table, "", flags.FLAGS), path))


def own_text() -> Any:
    """The function that fits a run to a text; it loads the data stack."""
    from lm2_jax.data.own_text import own_text

    return own_text


def _last(typed: Sequence[Flag], name: str) -> str | None:
    """The value of a flag that has to be known before the others."""
    found = [flag for flag in typed if flag.name == name]
    return flags.parse(str, found[-1]) if found else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and trains; leaves the process with the run's status."""
    command = parse(sys.argv[1:] if arguments is None else arguments)
    if command is None:
        return
    run, options, mesh_is_set = command

    def mesh(devices: int) -> MeshConfig:
        return options.mesh if mesh_is_set else mesh_for(run.name, devices)

    if options.dump_config is not None:
        files.write_text(options.dump_config, json.dumps(to_dict(run), indent=1) + "\n", "--dump-config")
        return
    if options.compilation.is_requested():
        status = compile_and_report(run, mesh, options.compilation)
        sys.stdout.flush()
        os._exit(status)  # the compiler may still be at work, see --quick
    if options.plan:
        print(describe_plan(run, options.mesh))
        return
    train(run, options, mesh)


def train(run: RunConfig, options: TrainOptions, mesh: Any) -> None:
    """Trains on this machine's devices, or those of all hosts; leaves the process with the run's status."""
    workdir = files.check_workdir(f"runs/{run.name}" if options.workdir is None else options.workdir)
    _check_profile(run, options.profiling)
    spare_threads(jax.config.values["jax_num_cpu_devices"])
    if options.distributed:
        join_hosts()
    check_memory(run, jax.devices())
    layout = Layout(make_mesh(mesh(jax.device_count())), config=run)
    source = options.init.from_
    if source is not None and (options.overwrite or not saved_steps(workdir)):
        check_first_weights(source, run)
    if options.overwrite:
        files.confirm_overwrite(workdir, options.yes, options.distributed)
    outcome = fit(run, workdir, layout, options.profiling, options.init.from_, options.overwrite)
    _report_missing_trace(options.profiling)
    if jax.process_index() == 0:
        _draw(workdir, run)
        print(what_next(run, os.fspath(workdir), outcome.stopped_by is None))
    sys.exit(outcome.status)


def _draw(workdir: epath.Path, run: RunConfig) -> None:
    """The picture of the training; the run is saved already, so a picture that cannot be written is only reported."""
    from lm2_jax.training import curves

    try:
        file = curves.write(workdir, run)
    except OSError as error:
        print(f"{curves.FILE}: writing failed: {error}", file=sys.stderr)
        return
    if file is not None:
        print(f"Curves of the training: {file}")


def what_next(run: RunConfig, workdir: str, is_finished: bool) -> str:
    """What was saved, and the commands that use it, as they can be typed."""
    if not is_finished:
        return f"Saved in {workdir}. The same command again resumes the run."
    where, calls = shlex.quote(workdir), []
    for suite in run.data.source.suites:
        option = "--workdirs" if suite == "recall" else "--workdir"
        calls.append(f"{cli.program('eval')} {suite} {option} {where}")
    if run.loss.text_weight > 0:
        calls.append(f'{cli.program("generate")} --workdir {where} --prompt "The"')
    return "\n".join([f"Saved in {workdir}. To use it:", *(f"    {call}" for call in calls)])


def _check_profile(run: RunConfig, profiling: ProfileConfig) -> None:
    if profiling.profile is not None and profiling.profile_after >= run.optim.steps:
        raise UserError(
            f"--profile-after {profiling.profile_after}: the run has only {run.optim.steps} steps, so none would be "
            "traced; make it smaller, or --optim.steps larger"
        )


def _report_missing_trace(profiling: ProfileConfig) -> None:
    folder = profiling.profile
    if folder is not None and not (epath.Path(folder) / "plugins").exists():
        print(
            f"--profile: no trace was written to {folder}, because the run ended before step --profile-after "
            f"{profiling.profile_after} of this call; choose a smaller --profile-after"
        )
