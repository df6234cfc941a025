"""Requests to stop: noted when they come, obeyed at the next border between steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """Catches SIGTERM and SIGINT while it is open; a second SIGINT interrupts at once.

    On several hosts all must stop at the same step: there jax itself catches SIGTERM and lets them agree.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._old = {}

    def requested(self, step: int) -> bool:
        """Whether the run is to stop behind this step; the same answer on every host."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.caught = signal.SIGTERM
        return self.caught is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = number

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread only.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
