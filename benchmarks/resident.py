"""Resident memory of this process, as the operating system counts it."""

import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes, such as VmRSS, the resident memory."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak(call: Callable[[], Any]) -> int:
    """Peak of the resident memory during a call, minus the memory before it.

    It is sampled every millisecond, because not every system can reset the peak that it records.
    """
    before, most, done = status_bytes("VmRSS"), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, status_bytes("VmRSS"))
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    call()
    done.set()
    thread.join()
    return most - before
