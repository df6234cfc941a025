"""Files and folders that a command line names: config files and workdirs."""

import sys
from typing import Any

from etils import epath

from lm2_jax import cli
from lm2_jax.atomic import is_remote
from lm2_jax.commands.flags import merge
from lm2_jax.config import RunConfig, from_dict, to_dict
from lm2_jax.config_file import Source, read_table, take_format
from lm2_jax.errors import UserError
from lm2_jax.fields import hints
from lm2_jax.training.replace import holds_run
from lm2_jax.training.workdir import check_foreign


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
                f"`{cli.program('train')} quickstart --config {path}`"
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
    check_foreign(workdir)
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


def confirm_overwrite(workdir: epath.Path, yes: bool, distributed: bool) -> None:
    """Asks whether the run in a workdir is to be replaced, if there is one and `yes` does not say so.

    Raises:
      UserError: the answer was not yes; or several hosts, or a bucket.
    """
    if not holds_run(workdir):
        return
    if distributed or is_remote(workdir):
        raise UserError("--overwrite works in a local folder and on one host; choose another --workdir")
    if not yes:
        _ask(workdir)


def _ask(workdir: epath.Path) -> None:
    question = f"Replace the run in {workdir}? [y/N] "
    if not sys.stdin.isatty():
        raise UserError(f"--overwrite would delete the run in {workdir}; without a terminal to ask, add --yes")
    if input(question).strip().lower() not in ("y", "yes"):
        raise UserError(f"--overwrite was not confirmed; the run in {workdir} stays as it was")
