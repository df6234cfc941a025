"""The lock of a workdir: one run at a time writes to it."""

import contextlib
import fcntl
import json
import os
import socket
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
        self._token, self._descriptor = uuid.uuid4().hex, None
        self.lost = False
        try:
            if is_remote(workdir):
                self._acquire_remote()
            else:
                self._acquire_local()
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error}", status=1) from error
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="workdir-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises a `UserError` where another process has taken the workdir over, as after a long pause of this one."""
        if self.lost:
            raise UserError(
                f"{self._workdir}: another process has taken this run over, because this one gave no sign of life for "
                f"{GONE_SECONDS:.0f} seconds. This process stops and has changed nothing since.",
                status=1,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # the workdir may be gone; the lock then is gone too
            if not self.lost and (self._read() or {}).get("token") == self._token:
                self._path.unlink()
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _acquire_local(self) -> None:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise self._refusal(self._read()) from None
            except OSError:  # a file system without such locks
                pass
            if not self._path.exists() or os.fstat(descriptor).st_ino != os.stat(self._path).st_ino:
                os.close(descriptor)  # its owner has removed it in between
                continue
            owner = self._read()
            # The kernel says that no process of this machine owns it; one of another machine is judged by its age.
            if owner is not None and owner.get("boot") != _boot() and _age(owner) < GONE_SECONDS:
                os.close(descriptor)
                raise self._refusal(owner)
            self._descriptor = descriptor
            self._write()
            return

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
        time.sleep(1.0)  # of two that took over at the same time, the last one to write stays
        if (self._read() or {}).get("token") != self._token:
            raise self._refusal(self._read())

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                if (self._read() or {}).get("token", self._token) != self._token:
                    self.lost = True
                    return
                self._write()
            except Exception:  # of a bucket without network, say: the next beat tries again
                continue

    def _content(self) -> bytes:
        owner = {
            "user": os.environ.get("USER") or f"uid {os.getuid()}",
            "host": socket.gethostname(),
            "boot": _boot(),
            "pid": os.getpid(),
            "token": self._token,
            "time": time.time(),
        }
        return (json.dumps(owner) + "\n").encode()

    def _write(self) -> None:
        if self._descriptor is None:
            self._path.write_bytes(self._content())
        else:  # in place: the kernel's lock belongs to this file; shorter than a block
            content = self._content()
            os.pwrite(self._descriptor, content, 0)
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
