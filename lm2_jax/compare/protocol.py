"""Which runs a comparison consists of, and how the search chooses a preset and a learning rate for each method."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lm2_jax.config import RunConfig
from lm2_jax.errors import UserError

FIRST_SEARCH_SEED = 10_000  # seeds of the search are none of the seeds that are reported


class Job(NamedTuple):
    """One run."""

    preset: str
    learning_rate: float
    seed: int
    steps: int
    workdir: pathlib.Path


class Choice(NamedTuple):
    """What a method is reported with."""

    preset: str
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How methods are compared.

    Attributes:
      methods: the presets of each method, of which one is reported.
      configs: by preset.
      learning_rates: that are tried; none: each preset's own.
      search_seeds: seeds of the search, per rate.
      search_steps: steps of a run of the search.
      seeds: seeds that are reported.
      steps: steps of a reported run; None: each preset's own.
      folder: of the workdirs.
    """

    methods: tuple[tuple[str, ...], ...]
    configs: dict[str, RunConfig]
    learning_rates: tuple[float, ...]
    search_seeds: int
    search_steps: int | None
    seeds: int
    steps: int | None
    folder: pathlib.Path

    def steps_of(self, preset: str) -> int:
        """Steps of a reported run."""
        return self.steps or self.configs[preset].optim.steps

    def choices(self, method: tuple[str, ...]) -> list[Choice]:
        """What is tried for a method: each of its presets with each rate."""
        return [
            Choice(preset, rate)
            for preset in method
            for rate in self.learning_rates or (self.configs[preset].optim.learning_rate,)
        ]

    def search(self) -> Iterator[Job]:
        """Runs of the search; none for a method with one choice."""
        for method in self.methods:
            choices = self.choices(method)
            for choice in choices if len(choices) > 1 else ():
                steps = self.search_steps or max(1, self.steps_of(choice.preset) // 3)
                for seed in range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + self.search_seeds):
                    yield self._job("search", *choice, seed, steps)

    def reported(self, chosen: Sequence[Choice]) -> Iterator[Job]:
        """Runs that are reported, by what was chosen; seed by seed, so that a table of fewer seeds comes early."""
        for seed in range(self.seeds):
            for choice in chosen:
                yield self._job("runs", *choice, seed, self.steps_of(choice.preset))

    def _job(self, kind: str, preset: str, rate: float, seed: int, steps: int) -> Job:
        return Job(preset, rate, seed, steps, self.folder / kind / preset / f"rate_{rate:g}" / f"seed_{seed}")


def choose(protocol: Protocol, scores: dict[Job, float]) -> list[Choice]:
    """For each method the preset and rate with the highest mean score over the seeds of the search.

    Args:
      protocol: of the comparison.
      scores: of the search's runs, higher is better; a run that diverged has -inf.
    Raises:
      UserError: every rate of a method diverged.
    """
    chosen = []
    for method in protocol.methods:
        choices = protocol.choices(method)
        if len(choices) == 1:
            chosen += choices
            continue
        means = {choice: _mean([s for job, s in scores.items() if job[:2] == choice]) for choice in choices}
        best = max(means, key=lambda choice: means[choice])
        if means[best] == -float("inf"):
            rates = dict.fromkeys(f"{choice.learning_rate:g}" for choice in choices)
            raise UserError(
                f"compare: every learning rate of {','.join(method)} diverged ({', '.join(rates)}); give lower ones "
                "with --learning-rates",
                status=1,
            )
        chosen.append(best)
    return chosen


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def inequalities(tokens: dict[str, int], parameters: dict[str, int]) -> list[str]:
    """What is not equal between presets and a table must say: training tokens, and parameters by more than 3%."""
    found = []
    if len(set(tokens.values())) > 1:
        found.append("training tokens differ: " + ", ".join(f"{name} {count:,}" for name, count in tokens.items()))
    if parameters and max(parameters.values()) > 1.03 * min(parameters.values()):
        listed = ", ".join(f"{name} {count:,}" for name, count in parameters.items())
        found.append(f"parameters differ by more than 3%: {listed}")
    return found
