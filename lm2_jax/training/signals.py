"""Requests to stop: recorded when they arrive, obeyed between two steps."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """Catches SIGTERM and SIGINT while it is open.

    The first one stops the run after the current step. A second SIGINT interrupts at once, unless the run is already
    saving its last checkpoint (`finishing`), which takes seconds: then it only prints that.

    On several hosts all must stop at the same step. There jax itself catches SIGTERM and makes them agree, and a
    SIGINT is passed on to it.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self.finishing = False
        self._interrupted = False
        self._old = {}

    def requested(self, step: int) -> bool:
        """Whether the run is to stop after this step; the same answer on every host."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.caught = signal.SIGINT if self._interrupted else signal.SIGTERM
        return self.caught is not None

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._again(self.caught == number == signal.SIGINT)
        self.caught = self.caught or number

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._again(self._interrupted)
        if not self._interrupted:
            self._interrupted = True
            os.kill(os.getpid(), signal.SIGTERM)

    def _again(self, second: bool) -> None:
        if self.finishing:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"saving the last checkpoint, please wait\n")
        elif second:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python allows handlers in the main thread only
        alone = {signal.SIGTERM: self._record, signal.SIGINT: self._record}
        handlers = alone if jax.process_count() == 1 else {signal.SIGINT: self._pass_on}
        self._old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
