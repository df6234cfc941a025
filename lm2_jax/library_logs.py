"""What Orbax and its threads print when a file cannot be read or written; our own message reports the cause."""

import contextlib
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

SHOW = "LM2_JAX_LIBRARY_LOGS"  # set to 1, this environment variable lets everything through
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
    before = sys.unraisablehook, threading.excepthook

    def unraisable(hint: "sys.UnraisableHookArgs") -> None:
        error = hint.exc_value
        closed = isinstance(error, RuntimeError) and "Event loop is closed" in str(error)
        coroutine = getattr(hint.object, "cr_code", None)  # of a read or write that was dropped
        if not (closed or (coroutine is not None and "orbax" in coroutine.co_filename)):
            before[0](hint)

    def thread_failed(hint: threading.ExceptHookArgs) -> None:
        if "Event loop is closed" not in str(hint.exc_value):
            before[1](hint)

    for logger in loggers:
        logger.addFilter(_nothing)
    sys.unraisablehook, threading.excepthook = unraisable, thread_failed
    try:
        yield
    except BaseException:
        drop_late_work()
        raise
    finally:
        sys.unraisablehook, threading.excepthook = before
        for logger in loggers:
            logger.removeFilter(_nothing)


def drop_late_work() -> None:
    """After a failure: lets reads and writes that are under way end, and what is left of them be collected."""
    time.sleep(0.05)
    gc.collect()


def _nothing(record: logging.LogRecord) -> bool:
    return False
