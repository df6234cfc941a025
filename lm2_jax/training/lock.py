"""The lock of a workdir: one run at a time writes to it."""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from types import TracebackType
from typing import Any, Self

from etils import epath

from lm2_jax.atomic import is_remote
from lm2_jax.errors import UserError

FILE = "run.lock"
BEAT_SECONDS = 20.0  # between two signs of life
GONE_SECONDS = 120.0  # without one, an owner on another host is taken for dead
SETTLE_SECONDS = 1.0  # in which two processes that take over at the same time see each other
FILE_BYTES = 512  # one block, so that no reader sees half an owner


class TakenOver(UserError):
    """Another process owns the workdir now: this one must not write to it any more."""


class WorkdirLock:
    """Owned from construction until it is closed.

    A local folder is locked by the kernel (`flock`), which releases the lock however the process ends. The lock file
    also names the owner and the time of its last sign of life, for hosts that share the folder through a network and
    for buckets, where the kernel's lock does not reach.

    Args:
      workdir: existing folder, or a bucket.
    Raises:
      UserError: another process owns it.
    """

    def __init__(self, workdir: epath.Path):
        self._workdir, self._path = workdir, workdir / FILE
        self._token = uuid.uuid4().hex
        self._descriptor: int | None = None
        self._kernel = True  # whether the file system has locks of the kernel
        self._created = False  # whether the file was not there before
        self.lost = False
        try:
            if is_remote(workdir):
                self._acquire_remote()
            else:
                self._acquire_local()
        except OSError as error:
            self._close()
            raise UserError(f"{self._path} cannot be written: {error}", status=1) from error
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="workdir-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `TakenOver` where another process has taken the workdir over, as after a long pause of this one."""
        if not self.owns():
            raise TakenOver(
                f"{self._workdir}: another process has taken this run over, because this one gave no sign of life for "
                f"{GONE_SECONDS:.0f} seconds. This process stops and has changed nothing since.",
                status=1,
            )

    def owns(self) -> bool:
        """Whether the workdir is still this process's, as its file says now; a file that cannot be read says yes."""
        self.lost = self.lost or (self._read() or {}).get("token", self._token) != self._token
        return not self.lost

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # the workdir may be gone; the lock then is gone too
            if self.owns():
                self._path.unlink()
        self._close()

    def _acquire_local(self) -> None:
        while not self._open_and_lock():
            pass
        owner = self._read()
        if owner is None and not self._created:
            time.sleep(SETTLE_SECONDS)  # another host may have made the file at this moment
            owner = self._read()
        # With a kernel's lock no process of this machine owns it; else its process shows whether it lives.
        here = owner is not None and owner.get("boot") == _boot()
        gone = owner is None or _age(owner) >= GONE_SECONDS or (here and (self._kernel or _is_gone_here(owner)))
        if not gone:
            self._close()
            raise self._refusal(owner)
        self._write()
        if not self._created and not (self._kernel and here):  # where the kernel's lock may not reach all others
            self._confirm()

    def _open_and_lock(self) -> bool:
        """Opens the file and takes the kernel's lock of it; False where the file was removed in between.

        Raises:
          UserError: another process has the lock.
        """
        flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
        try:
            self._descriptor = os.open(self._path, flags | os.O_CREAT | os.O_EXCL, 0o666)
            self._created = True  # on one of two hosts that start at the same time
        except FileExistsError:
            try:
                self._descriptor, self._created = os.open(self._path, flags), False
            except FileNotFoundError:
                return False
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise self._refusal(self._named_owner()) from None
        except OSError:  # a file system without such locks
            self._kernel = False
        try:  # the last owner removes the file before it releases its lock
            if os.path.samestat(os.fstat(self._file), os.stat(self._path)):
                return True
        except FileNotFoundError:
            pass
        self._close()
        return False

    def _named_owner(self) -> dict[str, Any] | None:
        """The owner, which takes a moment to write its name after it has locked the file."""
        for _ in range(20):
            owner = self._read()
            if owner is not None and not _is_gone_here(owner):
                return owner
            time.sleep(0.05)
        return self._read()

    def _acquire_remote(self) -> None:
        owner = self._read()
        if owner is not None and _age(owner) < GONE_SECONDS and not _is_gone_here(owner):
            raise self._refusal(owner)
        if owner is None:
            try:  # only one of two processes succeeds where the bucket supports it
                _file_system(self._path).pipe_file(str(self._path), self._content(), mode="create")
            except FileExistsError:
                raise self._refusal(self._read()) from None
            except (TypeError, ValueError, NotImplementedError):
                self._write()
        else:
            self._write()
        self._confirm()

    def _confirm(self) -> None:
        """Of two processes that took over at the same time, the last one to write stays."""
        time.sleep(SETTLE_SECONDS)
        owner = self._read() or {}
        if owner.get("token") != self._token:
            self._close()
            raise self._refusal(owner)

    @property
    def _file(self) -> int:
        assert self._descriptor is not None
        return self._descriptor

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _beat(self) -> None:
        is_failing = False
        while not self._stop.wait(BEAT_SECONDS):
            try:
                if not self.owns():
                    return
                self._write()
                is_failing = False
            except Exception as error:  # of any type: buckets have clients of several libraries
                if not is_failing:
                    print(
                        f"warning: {self._path}: the sign of life was not written: {type(error).__name__}: {error}. It "
                        f"is tried again every {BEAT_SECONDS:g} seconds; after {GONE_SECONDS:g} seconds without one, a "
                        "process on another host may take the run over.",
                        file=sys.stderr,
                        flush=True,
                    )
                is_failing = True

    def _content(self) -> bytes:
        owner = {
            "user": os.environ.get("USER") or f"uid {os.getuid()}",
            "host": socket.gethostname(),
            "boot": _boot(),
            "pid": os.getpid(),
            "token": self._token,
            "time": time.time(),
        }
        return (json.dumps(owner) + "\n").encode().rjust(FILE_BYTES)  # blanks first: a file cut short is not read

    def _write(self) -> None:
        if self._descriptor is None:
            self._path.write_bytes(self._content())
        else:  # in place, as the kernel's lock belongs to this file, and in one call
            content = self._content()
            os.pwrite(self._descriptor, content, 0)
            if os.fstat(self._descriptor).st_size != len(content):
                os.ftruncate(self._descriptor, len(content))

    def _read(self) -> dict[str, Any] | None:
        """The owner that the file names; None where there is none, or it was killed before it wrote its name."""
        try:
            owner = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return None
        return owner if isinstance(owner, dict) else None

    def _refusal(self, owner: dict[str, Any] | None) -> UserError:
        owner = owner or {}
        return UserError(
            f"{self._workdir} is in use by process {owner.get('pid', '?')} of {owner.get('user', '?')} on host "
            f"{owner.get('host', '?')}, last seen {max(_age(owner), 0):.0f} seconds ago. Wait until it has ended, or "
            f"choose another --workdir. A process that is gone is noticed: on this host at once, on another one after "
            f"{GONE_SECONDS:.0f} seconds. Nothing was changed.",
            status=1,
        )


def _age(owner: dict[str, Any]) -> float:
    seen = owner.get("time")
    return time.time() - seen if isinstance(seen, int | float) else float("inf")


def _is_gone_here(owner: dict[str, Any]) -> bool:
    """Whether an owner was a process of this machine that has ended."""
    if owner.get("boot") != _boot() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return owner["pid"] == os.getpid()  # another process once had our number


def _boot() -> str:
    """Names this start of this machine; containers of one machine have the same, and so the same kernel's locks."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


def _file_system(path: epath.Path) -> Any:
    import fsspec

    return fsspec.filesystem(str(path).split("://")[0])
