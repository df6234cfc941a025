"""Trains and evaluates presets under one protocol: `python -m lm2_jax.compare PRESET ... --out DIR`.

The learning rate of each method is chosen on development seeds, whose data is not in the table. A method is a preset,
or several joined by commas, such as one with other stages, of which one is chosen too. Then every method is trained
with the same seeds. The same command again resumes: finished runs are only read, from DIR/finished.jsonl, so their
folders can be deleted. Options after `--` are options of every training, as in `... --out DIR -- --data.rows 8`.
"""

import itertools
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import jax
from etils import epath

from lm2_jax import atomic, cli
from lm2_jax.commands import dataclass_options, flags
from lm2_jax.commands.dataclass_options import First
from lm2_jax.commands.train import parse
from lm2_jax.compare import jobs, table
from lm2_jax.compare.finished import Finished
from lm2_jax.compare.protocol import Choice, Job, Protocol, choose
from lm2_jax.config import RunConfig, from_dict
from lm2_jax.errors import UserError
from lm2_jax.evaluation import SUITES
from lm2_jax.evaluation.names import model_name
from lm2_jax.folders import prepare_folder
from lm2_jax.model import LanguageModel
from lm2_jax.state import state_floats
from lm2_jax.training.state import make_plan


@dataclass(frozen=True)
class Command:
    """Options."""

    presets: Annotated[tuple[str, ...], First()]
    """Methods to compare: presets, or several joined by commas, of which the search chooses one."""
    out: str
    """Folder of the runs and of compare.json, compare.md and compare.png."""
    seeds: int = 3
    """Seeds of parameters and data that are reported: 0, 1, ..."""
    learning_rates: tuple[float, ...] = ()
    """Rates to choose from for each preset; none: the preset's own."""
    budget: int | None = None
    """Optimizer steps of a reported run; None: each preset's own."""
    search_steps: int | None = None
    """Optimizer steps of a run of the search; None: a third of a reported run's."""
    search_seeds: int = 1
    """Development seeds for each rate."""
    suite: str = "recall --segments 4 16 --rows 512"
    """What judges a run in addition to its held-out metrics, with options in one quoted word: `recall`, where the data
    has questions at known distances, or `babilong`; `lm2 eval SUITE --help` lists the options."""
    jobs: int = 1
    """Runs at the same time, each with its share of the cores; on a CPU one for each core is fastest."""

    def check(self) -> None:
        """Raises UserError for numbers that make no sense, and for a preset that is named twice."""
        for name in ("seeds", "search_seeds", "jobs"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        for name in ("budget", "search_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        if not self.presets:
            raise UserError("expected presets to compare, as in `lm2 compare lm2_tiny none_tiny --out DIR`")
        names = [name for method in self.methods for name in method]
        if len(set(names)) < len(names):
            raise UserError(f"a preset is named twice: {' '.join(self.presets)}")
        if any(rate <= 0 for rate in self.learning_rates) or len(set(self.learning_rates)) < len(self.learning_rates):
            raise UserError("--learning-rates: expected different positive numbers")
        check_suite(self.suite, self.evaluation)

    @property
    def methods(self) -> tuple[tuple[str, ...], ...]:
        """The presets of each method."""
        return tuple(tuple(word.split(",")) for word in self.presets)

    @property
    def evaluation(self) -> list[str]:
        """The suite and its options."""
        try:
            return shlex.split(self.suite)
        except ValueError as error:
            raise UserError(f"--suite {self.suite!r}: {error}") from error


def check_suite(typed: str, evaluation: Sequence[str]) -> None:
    """Refuses a suite or options that are unknown, before anything runs, and options that the program sets itself.

    Raises:
      UserError: with the option and what is expected.
    """
    suite, options = (evaluation[0], evaluation[1:]) if evaluation else ("", [])
    words, given = flags.split(options)
    own = [flag.typed for flag in given if flag.name in ("workdir", "workdirs", "out")]
    if suite not in jobs.WORKDIR_OPTION or words or own:
        wrong = " ".join([*words, *own])
        raise UserError(
            f"--suite {typed!r}: expected one of {', '.join(jobs.WORKDIR_OPTION)} and its options"
            + (f", without {wrong}" if wrong else "")
        )
    table = flags.default_table(SUITES[suite])
    flags.apply([(SUITES[suite], table)], [*given, *flags.split([jobs.WORKDIR_OPTION[suite], "W"])[1]])
    from_dict(SUITES[suite], table, "", flags.FLAGS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and compares."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own, options = arguments[:at], arguments[at + 1 :]
    command = dataclass_options.parse(Command, cli.program("compare"), __doc__ or "", own)
    command.check()
    jax.config.update("jax_platforms", "cpu")  # of this process alone, which must not hold the accelerator
    with cli.sigterm_as_exit():  # which ends the runs too
        compare(command, options, " ".join(["python -m lm2_jax.compare", shlex.join(arguments)]))


def compare(command: Command, options: Sequence[str], typed: str) -> None:
    """Runs the protocol and writes its files, after each seed anew."""
    configs = {name: _config(name, options, command) for method in command.methods for name in method}
    out = pathlib.Path(prepare_folder(epath.Path(os.path.abspath(command.out))))
    protocol = Protocol(
        command.methods,
        configs,
        command.learning_rates,
        command.search_seeds,
        command.search_steps,
        command.seeds,
        command.budget,
        out,
    )
    finished = Finished(out, configs, _machine())
    runner = jobs.Runner(options, command.evaluation, command.jobs, lambda line: print(line, flush=True), finished)
    of_search = list(protocol.search())
    known = sum(finished.find(job, "metrics", None) is not None for job in of_search)
    print(
        f"runs: {len(of_search)} of the search ({known} finished before), then {command.seeds * len(command.methods)} "
        f"that are reported, {command.jobs} at a time",
        flush=True,
    )
    searched = runner.search(of_search)
    scores = {job: jobs.score(metrics) for job, metrics in searched.items()}
    chosen = choose(protocol, scores)
    results = {
        choice.preset: _empty(choice, configs[choice.preset], protocol, method, scores)
        for choice, method in zip(chosen, command.methods, strict=True)
    }
    for _, of_seed in itertools.groupby(protocol.reported(chosen), key=lambda job: job.seed):
        for job, seed in _seed_results(list(of_seed), runner, command.evaluation[0]).items():
            results[job.preset].seeds.append(seed)
        files = table.to_files(list(results.values()), typed, finished.machines())
        atomic.write_files({out / name: content for name, content in files.items()})
    print(table.markdown(list(results.values()), typed, finished.machines()))
    print("\n".join(f"wrote {out / name}" for name in files))


def _config(preset: str, options: Sequence[str], command: Command) -> RunConfig:
    """The config of a preset with the options of every training; wrong ones are reported before anything runs."""
    steps = [] if command.budget is None else ["--optim.steps", str(command.budget)]
    parsed = parse([preset, *steps, *options])
    if parsed is None:
        raise UserError(f"options after --: {' '.join(options)}: expected options of a training")
    if parsed.run.train.eval_batches == 0:
        raise UserError(f"{preset} has train.eval_batches=0, so nothing is measured; add -- --train.eval-batches 4")
    return parsed.run


def _seed_results(of_seed: list[Job], runner: jobs.Runner, suite: str) -> dict[Job, table.SeedResult]:
    """The reported runs of one seed."""

    def is_judged(metrics: dict[str, float]) -> bool:  # `recall` needs questions at known distances
        return suite != "recall" or any(name.startswith("eval_accuracy_d") for name in metrics)

    return {
        job: table.SeedResult(job.seed, str(job.workdir), metrics, results)
        for job, (metrics, results) in runner.report(of_seed, is_judged).items()
    }


def _empty(
    choice: Choice, config: RunConfig, protocol: Protocol, method: Sequence[str], scores: dict[Job, float]
) -> table.PresetResult:
    """What is known of a method before its seeds."""
    model = LanguageModel(config.model)
    params = make_plan(config, model).shapes.params
    found = [(job, score) for job, score in scores.items() if job.preset in method]
    steps = protocol.steps_of(choice.preset)
    return table.PresetResult(
        preset=choice.preset,
        model=model_name(config.model),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        state_floats=state_floats(jax.eval_shape(lambda: model.init_state(1))),
        tokens=steps * config.data.rows * max(config.data.segments) * config.model.segment_tokens,
        steps=steps,
        learning_rate=choice.learning_rate,
        search=[
            {
                "preset": job.preset,
                "learning_rate": job.learning_rate,
                "seed": job.seed,
                "score": None if score == -float("inf") else score,
            }
            for job, score in found
        ],
        seeds=[],
    )


def _machine() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.machine()}, {os.cpu_count()} cores"
