"""A profiler trace of a few steps, for XProf or TensorBoard's profile plugin."""

import dataclasses
import sys
from types import TracebackType
from typing import Self

import jax

from lm2_jax.folders import prepare_folder


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """What is traced; not part of a run's config, so that any start of a run can ask for it."""

    profile: str | None = None
    """Folder or bucket for an XPlane trace of some steps; None: none is written."""
    profile_after: int = 3
    """Steps of this call before the trace: the first ones compile and settle."""
    profile_steps: int = 3
    """Steps traced."""

    def __post_init__(self) -> None:
        if self.profile_steps < 1 or self.profile_after < 0:
            raise ValueError(
                f"profile_steps={self.profile_steps} must be at least 1, profile_after={self.profile_after} at least 0"
            )

    def prepare(self) -> None:
        """Makes the folder: one that cannot be written to is a `UserError` before training begins."""
        if self.profile is not None:
            prepare_folder(self.profile, "--profile")


class Profiler:
    """Starts and stops the trace around the steps that were asked for.

    Args:
      config: which steps.
      start: step at which this call began.
    """

    def __init__(self, config: ProfileConfig, start: int):
        self._folder = config.profile
        self._first = start + config.profile_after
        self._last = self._first + config.profile_steps
        self._running = False

    def before(self, step: int) -> None:
        """Called before `step`, counted from 0, is dispatched; the devices may still be running the one before."""
        if self._folder is not None and step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: object) -> None:
        """Called when `step` is dispatched; after the last one it waits for its result, and writes the trace."""
        if self._running and step + 1 == self._last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        self._running = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # whatever the profiler raises over a full disk: the run itself is fine
            print(f"warning: --profile={self._folder!r}: the trace was not written: {error}", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running:  # the run ended earlier
            self._stop()
