"""Files and folders that a command line names: config files, workdirs, and runs that are replaced."""

import contextlib
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from etils import epath

from lm2_jax.commands.flags import merge
from lm2_jax.config import RunConfig, from_dict, to_dict
from lm2_jax.config_file import Source, read_table, take_format
from lm2_jax.errors import UserError
from lm2_jax.fields import hints
from lm2_jax.training.lock import WorkdirLock

# What training writes into a workdir; names that begin with a dot are temporary.
OF_A_RUN = (
    "config.json",
    "checkpoints",
    "metrics.jsonl",
    "metrics.damaged.jsonl",
    "tensorboard",
    "tracker.json",
    "tokenizer.json",
    "tokenizer.model",
)
NOT_REPLACED = ("run.lock", "eval")  # in a workdir too; --overwrite leaves them
ASIDE = ".replaced"  # the old run while a new one with --overwrite is under way


def config_table(path: str, base: dict[str, Any] | None) -> dict[str, Any]:
    """The table of a run from a config file.

    Args:
      path: of a JSON or YAML file with all fields of a run, or some.
      base: the run whose fields a partial file changes; None: the preset that the file's `name` says.
    Raises:
      UserError: the file cannot be read, or is damaged; a partial one without a base.
    """
    try:
        text = reachable(path, "--config").read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}") from error
    found = read_table(path, text)
    if isinstance(found, dict) and {"name", "model", "data", "optim", "train"} <= found.keys():
        return to_dict(from_dict(RunConfig, found, path))
    if base is None:
        from lm2_jax.presets import PRESETS

        name = found.get("name") if isinstance(found, dict) else None
        if not isinstance(name, str) or name not in PRESETS:
            raise UserError(
                f"--config {path} sets only some of {list(hints(RunConfig))}: name the preset that it changes, as in "
                f"`train.py quickstart --config {path}`"
            )
        base = to_dict(PRESETS[name])
    if isinstance(found, dict):
        take_format(RunConfig, found, path, Source())
    merge(RunConfig, base, found, path, Source())
    return base


def reachable(path: str, flag: str) -> epath.Path:
    """A path, of a bucket only if its library is installed and it can be asked.

    Raises:
      UserError: it cannot; or the path is empty or no path.
    """
    if not path.strip() or "\0" in path:
        raise UserError(f"{flag} {path!r}: expected a path")
    try:
        place = epath.Path(path)
        place.exists()
    except KeyError as error:
        known = "gs:// and s3://"
        raise UserError(f"{flag} {path}: unknown kind of storage; {known} or a local path are known") from error
    except ImportError as error:
        needs = {"gs": "etils[epath-gcs]", "s3": "etils[epath-s3]"}.get(path.partition("://")[0], "etils[epath]")
        raise UserError(f"{flag} {path}: needs a library; install it with `pip install '{needs}'`") from error
    except Exception as error:
        if "://" not in path and not isinstance(error, OSError):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{flag} {path}: cannot be reached: {reason}", status=1) from error
    return place


def check_workdir(path: str) -> epath.Path:
    """The workdir, if it is new or empty or holds a run; nothing is made.

    Raises:
      UserError: it is a file, or a folder of other files.
    """
    workdir = reachable(path, "--workdir")
    if not workdir.exists():
        return workdir
    if not workdir.is_dir():
        raise UserError(f"--workdir {path}: expected a folder, this is a file")
    names = [entry.name for entry in workdir.iterdir()]
    others = [name for name in names if name not in OF_A_RUN + NOT_REPLACED and not name.startswith(".")]
    if others and not any(name in OF_A_RUN for name in names):
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(
            f"--workdir {path} holds other files ({', '.join(sorted(others)[:3])}{more}) and no run; choose a new "
            "folder, or one of a run to resume it"
        )
    return workdir


def write_text(path: str, text: str, flag: str) -> None:
    """Writes a small file that an option names; "-" is the screen."""
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        reachable(path, flag).write_text(text)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written: {error}", status=1) from error


@contextlib.contextmanager
def replaced(workdir: epath.Path, overwrite: bool, yes: bool, distributed: bool) -> Iterator[None]:
    """Keeps the run of a workdir aside while another is trained there, if --overwrite asks for that.

    The old run comes back where the new one fails before its first checkpoint, and is deleted when the new one ends.

    Raises:
      UserError: the question was not answered with yes; another process trains the run; or several hosts, or a bucket.
    """
    old = [workdir / name for name in OF_A_RUN if (workdir / name).exists()] if overwrite else []
    if not old:
        yield
        return
    if distributed or "://" in os.fspath(workdir):
        raise UserError("--overwrite works in a local folder and on one host; choose another --workdir")
    if not yes:
        _ask(workdir)
    aside = pathlib.Path(workdir) / ASIDE
    with WorkdirLock(workdir):  # refuses a run that another process trains
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for path in old:
            pathlib.Path(path).rename(aside / path.name)
    try:
        yield
    except BaseException:
        checkpoints = pathlib.Path(workdir) / "checkpoints"
        if not checkpoints.exists() or not any(entry.name.isdigit() for entry in checkpoints.iterdir()):
            for name in OF_A_RUN:
                _remove(pathlib.Path(workdir) / name)
                if (aside / name).exists():
                    (aside / name).rename(pathlib.Path(workdir) / name)
            shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _ask(workdir: epath.Path) -> None:
    question = f"Replace the run in {workdir}? [y/N] "
    if not sys.stdin.isatty():
        raise UserError(f"--overwrite would delete the run in {workdir}; without a terminal to ask, add --yes")
    if input(question).strip().lower() not in ("y", "yes"):
        raise UserError(f"--overwrite was not confirmed; the run in {workdir} stays as it was")


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
