"""Which runs a comparison consists of, and how one learning rate is chosen from them."""

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


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How presets are compared.

    Attributes:
      configs: by preset.
      learning_rates: that are tried; none: each preset's own.
      search_seeds: seeds of the search, per rate.
      search_steps: steps of a run of the search.
      seeds: seeds that are reported.
      steps: steps of a reported run; None: each preset's own.
      folder: of the workdirs.
    """

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

    def rates_of(self, preset: str) -> tuple[float, ...]:
        """The learning rates that are tried."""
        return self.learning_rates or (self.configs[preset].optim.learning_rate,)

    def search(self) -> Iterator[Job]:
        """Runs of the search; none where there is only one rate."""
        for preset in self.configs:
            rates = self.rates_of(preset)
            steps = self.search_steps or max(1, self.steps_of(preset) // 3)
            for rate in rates if len(rates) > 1 else ():
                for seed in range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + self.search_seeds):
                    yield self._job("search", preset, rate, seed, steps)

    def reported(self, chosen: dict[str, float]) -> Iterator[Job]:
        """Runs that are reported, by the chosen rates; seed by seed, so that a table of fewer seeds comes early."""
        for seed in range(self.seeds):
            for preset in self.configs:
                yield self._job("runs", preset, chosen[preset], seed, self.steps_of(preset))

    def _job(self, kind: str, preset: str, rate: float, seed: int, steps: int) -> Job:
        return Job(preset, rate, seed, steps, self.folder / kind / preset / f"rate_{rate:g}" / f"seed_{seed}")


def choose_rates(protocol: Protocol, scores: dict[Job, float]) -> dict[str, float]:
    """For each preset the rate with the highest mean score over the seeds of the search.

    Args:
      protocol: of the comparison.
      scores: of the search's runs, higher is better; a run that diverged has -inf.
    Raises:
      UserError: every rate of a preset diverged.
    """
    chosen = {}
    for preset in protocol.configs:
        rates = protocol.rates_of(preset)
        if len(rates) == 1:
            chosen[preset] = rates[0]
            continue
        means = {rate: _mean([s for job, s in scores.items() if job[:2] == (preset, rate)]) for rate in rates}
        best = max(means, key=lambda rate: means[rate])
        if means[best] == -float("inf"):
            raise UserError(
                f"compare: every learning rate of {preset} diverged ({', '.join(f'{rate:g}' for rate in rates)}); give "
                "lower ones with --learning-rates",
                status=1,
            )
        chosen[preset] = best
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
