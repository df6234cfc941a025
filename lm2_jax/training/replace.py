"""`--overwrite`: a new run replaces the one in a workdir, which is kept until the new one has a checkpoint.

The old run is moved to a hidden folder in the workdir and back by renames of its files. The name of the hidden folder
says what is under way, so that the next start finishes whatever a kill interrupted:

    .replaced-moving    files are moved there, or back: the next start moves them back
    .replaced           all files are there: restored if the new run has no checkpoint, else kept until a call ends well
    .replaced-removing  the old run is being deleted: the next start deletes the rest

Everything here happens under the lock of the workdir, which the new run keeps until it ends.
"""

import contextlib
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

import jax
from etils import epath

from lm2_jax.atomic import is_remote
from lm2_jax.checkpoint import saved_steps
from lm2_jax.errors import UserError
from lm2_jax.training.hosts import run_on_all_hosts
from lm2_jax.training.lock import WorkdirLock
from lm2_jax.training.workdir import ASIDE, MOVING, REMOVING, RUN_FILES


def holds_run(workdir: epath.Path) -> bool:
    """Whether there is anything that `--overwrite` would replace."""
    return any((workdir / name).exists() for name in (*RUN_FILES, ASIDE, MOVING))


@contextlib.contextmanager
def replacement(workdir: epath.Path, lock: WorkdirLock | None, overwrite: bool) -> Iterator[None]:
    """Finishes an interrupted replacement, begins another if `overwrite`, and ends it when the new run has ended.

    The old run comes back where the new one ends without a checkpoint. It is deleted where the new one ends without an
    error; after an error it is kept.

    Args:
      workdir: locked by this process.
      lock: of the workdir; None on processes other than the first, which do nothing here.
      overwrite: whether the run in the workdir is replaced.
    Raises:
      UserError: files cannot be moved, or `overwrite` for a bucket or a job of several processes.
    """
    if overwrite and (is_remote(workdir) or jax.process_count() > 1):
        raise UserError("--overwrite works in a local folder and on one host; choose another --workdir")
    run_on_all_hosts(lambda: None if lock is None or is_remote(workdir) else _begin(pathlib.Path(workdir), overwrite))
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        # After a takeover, the files are another process's.
        if lock is not None and not is_remote(workdir) and lock.owns():
            _end(pathlib.Path(workdir), succeeded)


def _begin(workdir: pathlib.Path, overwrite: bool) -> None:
    try:
        _recover(workdir)
        if overwrite and any((workdir / name).exists() for name in RUN_FILES):
            _remove_aside(workdir)  # of an earlier replacement, whose new run has a checkpoint
            _set_aside(workdir)
    except OSError as error:
        raise _failure(workdir, error) from error


def _end(workdir: pathlib.Path, succeeded: bool) -> None:
    if not (workdir / ASIDE).exists():
        return
    try:
        if not saved_steps(workdir):
            _restore(workdir)
        elif succeeded:
            _remove_aside(workdir)
        else:
            _say(
                f"the run that --overwrite replaced is still in {workdir / ASIDE}. It is deleted when a later call in "
                "this workdir ends without an error. To go back to it, delete the other files and move its files up."
            )
    except OSError as error:
        if succeeded:
            raise _failure(workdir, error) from error
        _say(str(_failure(workdir, error)))  # the error of the run is the one to report


def _recover(workdir: pathlib.Path) -> None:
    """Finishes what a killed process left half done."""
    _delete(workdir / REMOVING)
    if (workdir / MOVING).exists():
        _move_back(workdir)
    if (workdir / ASIDE).exists() and not saved_steps(workdir):
        _restore(workdir)


def _set_aside(workdir: pathlib.Path) -> None:
    (workdir / MOVING).mkdir()
    try:
        for name in RUN_FILES:
            if (workdir / name).exists():
                os.rename(workdir / name, workdir / MOVING / name)
        os.rename(workdir / MOVING, workdir / ASIDE)
    except BaseException:
        _move_back(workdir)
        raise


def _restore(workdir: pathlib.Path) -> None:
    """Brings the old run back in place of a new one that saved nothing."""
    for name in RUN_FILES:
        _delete(workdir / name)
    os.rename(workdir / ASIDE, workdir / MOVING)
    _move_back(workdir)


def _move_back(workdir: pathlib.Path) -> None:
    names = os.listdir(workdir / MOVING)
    twice = [name for name in names if (workdir / name).exists()]
    if twice:
        raise UserError(
            f"{workdir / MOVING} holds files of a run that --overwrite was replacing, and {workdir} has some of the "
            f"same names ({', '.join(sorted(twice))}). Move one of the two runs to another folder.",
            status=1,
        )
    for name in names:
        os.rename(workdir / MOVING / name, workdir / name)
    os.rmdir(workdir / MOVING)
    _say(f"{workdir}: the run that --overwrite was replacing is back, because the new one had saved nothing")


def _remove_aside(workdir: pathlib.Path) -> None:
    if (workdir / ASIDE).exists():
        os.rename(workdir / ASIDE, workdir / REMOVING)
        _delete(workdir / REMOVING)


def _delete(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _failure(workdir: pathlib.Path, error: OSError) -> UserError:
    return UserError(
        f"--overwrite: {error}. Nothing of the old run was deleted; the next start in {workdir} restores it, unless "
        "the new run has a checkpoint",
        status=1,
    )


def _say(message: str) -> None:
    print(f"note: {message}", file=sys.stderr, flush=True)
