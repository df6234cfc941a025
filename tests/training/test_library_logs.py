"""What Orbax's threads log is not printed, also when they fail after our message; records of other code are."""

import logging
import sys
import threading

import pytest

from lm2_jax.library_logs import quiet_libraries

ORBAX = "/site-packages/orbax/checkpoint/_src/futures/future.py"


def fail(pathname: str) -> None:
    """Logs an exception as code in that file does."""
    logger = logging.getLogger("absl")
    try:
        raise OSError("disk full")
    except OSError:
        logger.handle(logger.makeRecord("absl", logging.ERROR, pathname, 1, "raised", (), sys.exc_info()))


def in_a_thread(pathname: str) -> None:
    thread = threading.Thread(target=fail, args=(pathname,))
    thread.start()
    thread.join()


def fail_a_save() -> None:
    with quiet_libraries():
        in_a_thread(ORBAX)
        raise OSError("the save failed")


def test_a_thread_that_fails_after_the_message_prints_nothing(caplog):
    with pytest.raises(OSError, match="the save failed"):
        fail_a_save()
    in_a_thread(ORBAX)
    assert caplog.records == []
    in_a_thread("/home/a_user/program.py")
    assert [record.message for record in caplog.records] == ["raised"]
