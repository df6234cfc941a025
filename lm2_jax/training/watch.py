"""The host's side of the loop: logs what steps report, and stops a run that has gone wrong."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np

from lm2_jax.checkpoint import Checkpoints
from lm2_jax.config import RunConfig
from lm2_jax.errors import UserError
from lm2_jax.training.metrics import MetricsLog, diagnostics
from lm2_jax.training.objective import means
from lm2_jax.training.optim_config import unweighted
from lm2_jax.training.progress import ProgressLine, Throughput
from lm2_jax.training.step import Report


def held_out_summary(values: dict[str, float], hidden: set[str]) -> str:
    """The metrics of an evaluation in one line, with the perplexity of its text.

    Args:
      values: by name, with the prefix `eval_`.
      hidden: metrics that are left out.
    """
    shown = {name.removeprefix("eval_"): value for name, value in values.items()}
    shown = {name: value for name, value in shown.items() if name not in hidden}
    words = [f"{name} {value:.3f}" for name, value in shown.items()]
    if "text_loss" in shown:
        words.append(f"perplexity of a text token {math.exp(min(shown['text_loss'], 700)):,.2f}")
    return " | ".join(words)


class Watch:
    """Sums reports between two logged steps, logs them and checks them.

    Args:
      config: of the run.
      checkpoints: named in the message when the run has to stop.
      log: where the lines go.
      progress: what a person sees.
      throughput: measures tokens per second.
      first_loss: of the run, where it is known from before a resume.
    """

    def __init__(
        self,
        config: RunConfig,
        checkpoints: Checkpoints,
        log: MetricsLog,
        progress: ProgressLine,
        throughput: Throughput,
        first_loss: float | None,
    ):
        self.first_loss = first_loss
        self._config, self._checkpoints = config, checkpoints
        self._log, self._progress, self._throughput = log, progress, throughput
        self._sums: dict[str, np.ndarray] = {}

    def read(self, step: int, report: Report, more: dict[str, float] | None = None) -> None:
        """Adds the report of a step; waits for the step where it is still running.

        Args:
          step: as counted from 1.
          report: still on the device.
          more: further values for this step's line, an evaluation; such a step is always logged.
        Raises:
          UserError: loss, gradient or anything else to be logged is not finite, or the loss diverges.
        """
        report = jax.device_get(report)
        self._check(step, report)
        for name, value in report.tally.items():
            self._sums[name] = self._sums.get(name, np.zeros(2)) + value
        self._progress.step(step)
        if not (more or step == 1 or step % self._config.train.log_every == 0 or step == self._config.optim.steps):
            return
        values = means(self._sums) | self._throughput.measure(step)
        self._sums = {}
        self._progress.show(step, values)
        values.pop("seconds_left", None)
        values |= {"grad_norm": float(report.grad_norm), "learning_rate": float(report.learning_rate)}
        values |= diagnostics(report.aux) | (more or {})
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            raise self._wrong(f"{', '.join(wrong)} at step {step} are not finite")
        self._log.write(step, values)
        if more:
            self._progress.say(f"step {step} held out | {held_out_summary(more, unweighted(self._config.loss))}")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside is not counted as training time."""
        start = time.monotonic()
        yield
        self._throughput.leave_out(time.monotonic() - start)

    def _check(self, step: int, report: Report) -> None:
        total, weight = (float(x) for x in report.tally["loss"])
        loss = total / weight if weight else 0.0
        if not (math.isfinite(loss) and math.isfinite(float(report.grad_norm))):
            raise self._wrong(f"loss {loss} and gradient norm {report.grad_norm} at step {step} are not finite")
        if self.first_loss is None and weight:
            self.first_loss = loss
        ratio = self._config.train.max_loss_ratio
        if self.first_loss is not None and loss > ratio * self.first_loss:
            raise self._wrong(
                f"the run diverged: loss {loss:.4g} at step {step} is more than train.max_loss_ratio={ratio} times "
                f"the first, {self.first_loss:.4g}"
            )

    def _wrong(self, what: str) -> UserError:
        max_tokens = self._config.model.decoder.max_tokens
        is_counted = max_tokens is None or not self._config.data.carry_state
        too_long = "" if is_counted else f"A document may be longer than model.decoder.max_tokens={max_tokens}. "
        return UserError(
            f"Training stopped: {what}. {self._checkpoints.last_good()} Nothing after it was saved. {too_long}A lower "
            "optim.learning_rate, a longer optim.warmup_steps or a lower optim.clip_norm may help, in a new --workdir.",
            status=1,
        )
