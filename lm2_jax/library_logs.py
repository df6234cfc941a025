"""What Orbax and its threads print when a file cannot be read or written; our own message reports the cause."""

import contextlib
import functools
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

SHOW = "LM2_JAX_LIBRARY_LOGS"  # set to 1, this environment variable lets everything through
_CLOSED = "Event loop is closed"
_LOGGERS = ("absl", "asyncio", "concurrent.futures", "orbax")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside it, the libraries' log records and the tracebacks of their threads are not printed.

    When a file of a checkpoint is damaged, or the disk is full, Orbax raises one exception, which we report, and its
    threads log pages of tracebacks about the same fault.
    """
    if os.environ.get(SHOW):
        yield
        return
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    show = threading.excepthook

    def thread_failed(hint: threading.ExceptHookArgs) -> None:
        if _CLOSED not in str(hint.exc_value):
            show(hint)

    for logger in loggers:
        logger.addFilter(_nothing)
    threading.excepthook = thread_failed
    try:
        with _HiddenWork():
            try:
                yield
            except BaseException:
                drop_late_work()
                raise
    finally:
        threading.excepthook = show
        for logger in loggers:
            logger.removeFilter(_nothing)


def drop_late_work() -> None:
    """After a failure: lets Orbax's reads and writes that are under way end, and what is left of them be collected."""
    if not os.environ.get(SHOW):
        _hide_dropped_work()
    time.sleep(0.05)
    gc.collect()


@functools.cache
def _hide_dropped_work() -> None:
    """Hides for good what is printed about Orbax's abandoned work, which may fail until the process ends."""
    _HiddenWork().__enter__()
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())


class _HiddenWork:
    """Inside it, Python does not print exceptions of Orbax's coroutines that nobody waits for; all others it does.

    Several may be open; each passes on to the hook that was there before the first.
    """

    count: int = 0
    show: Any = None

    def __enter__(self) -> None:
        if _HiddenWork.count == 0:
            _HiddenWork.show, sys.unraisablehook = sys.unraisablehook, _unraisable
        _HiddenWork.count += 1

    def __exit__(self, *_: object) -> None:
        _HiddenWork.count -= 1
        if _HiddenWork.count == 0:
            sys.unraisablehook = _HiddenWork.show


def _unraisable(hint: "sys.UnraisableHookArgs") -> None:
    coroutine = getattr(hint.object, "cr_code", None)
    of_orbax = coroutine is not None and "orbax" in coroutine.co_filename
    if not (of_orbax or _CLOSED in str(hint.exc_value)):
        _HiddenWork.show(hint)


def _nothing(record: logging.LogRecord) -> bool:
    return False
