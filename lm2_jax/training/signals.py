"""Requests to stop: noted when they come, obeyed at the next border between steps."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """Catches SIGTERM and SIGINT while it is open; a second SIGINT interrupts at once.

    On several hosts all must stop at the same step: there jax itself catches SIGTERM and lets them agree, and a SIGINT
    is passed on to it.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._interrupted = False
        self._old = {}

    def requested(self, step: int) -> bool:
        """Whether the run is to stop behind this step; the same answer on every host."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.caught = signal.SIGINT if self._interrupted else signal.SIGTERM
        return self.caught is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = number

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        os.kill(os.getpid(), signal.SIGTERM)

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python allows handlers in the main thread only
        alone = {signal.SIGTERM: self._note, signal.SIGINT: self._note}
        handlers = alone if jax.process_count() == 1 else {signal.SIGINT: self._pass_on}
        self._old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
