"""A workdir: which run it holds, whether it can be written to, and who claims it."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from lm2_jax import atomic, formats
from lm2_jax.checkpoint import FOLDER, Check, saved_steps
from lm2_jax.config import RunConfig, changes, from_dict, to_dict
from lm2_jax.data.tokenizers import FileTokenizer
from lm2_jax.errors import UserError
from lm2_jax.folders import check_writable, open_path
from lm2_jax.training import lock, metrics, trackers
from lm2_jax.training.hosts import all_gather_hosts, run_on_all_hosts
from lm2_jax.training.lock import WorkdirLock
from lm2_jax.training.state import TrainState
from lm2_jax.types import PyTree

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# What a run consists of, and what else is in a workdir and stays there where the run is replaced.
RUN_FILES = (CONFIG, *TOKENIZERS, FOLDER, metrics.FILE, metrics.DAMAGED, metrics.BOARD, trackers.FILE)
EXTRA_FILES = (lock.FILE, "eval")
ASIDE, MOVING, REMOVING = ".replaced", ".replaced-moving", ".replaced-removing"  # see lm2_jax/training/replace.py


def read_config(workdir: epath.PathLike) -> RunConfig:
    """The config of the run that a workdir holds.

    Raises:
      UserError: there is none, it is damaged, or a newer version wrote it.
    """
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        raise UserError(
            f"{workdir}: no run there; expected a folder with {CONFIG}, as training writes it{_hidden_run(workdir)}"
        )
    try:
        plain = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not a JSON file ({error or 'nested too deep'})", status=1) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}", status=1) from error
    return config_of(plain, str(path))


def config_of(plain: Any, what: str) -> RunConfig:
    """The config in a table that this or an older version wrote; `what` names the file in messages."""
    formats.check_format(plain, what)
    if isinstance(plain, dict):
        plain = {name: value for name, value in plain.items() if name != "version"}
    return from_dict(RunConfig, plain, f"{what}: config")


def _hidden_run(workdir: epath.PathLike) -> str:
    """Says where the run is if `--overwrite` was interrupted."""
    hidden = [name for name in (ASIDE, MOVING) if (epath.Path(workdir) / name).exists()]
    if not hidden:
        return ""
    return f". {hidden[0]} has a run that --overwrite was replacing: the next training in this workdir restores it"


def check_owner(workdir: epath.Path, config: RunConfig) -> bool:
    """Whether the workdir holds a run with checkpoints, which must be one of this config.

    A config without a checkpoint claims nothing: the run that wrote it was refused, killed or stopped before anything
    was saved, and another may take its place.

    Raises:
      UserError: it is another config's, with the fields that differ.
    """
    check_foreign(workdir)
    if not saved_steps(workdir):
        return False
    if not (workdir / CONFIG).exists():
        raise UserError(f"{workdir} has {FOLDER}/ but no {CONFIG} that says whose they are; choose another --workdir")
    _compare(read_config(workdir), config, f"{workdir} belongs to a run of another config.")
    return True


def check_foreign(workdir: epath.Path) -> None:
    """Refuses a folder of something else, such as a home folder, a repository or a model of another program.

    A workdir is a missing or empty folder, or one with files of a run. Hidden files and logs (`*.log`) are ignored, and
    where there is a config of a run so are all other files.

    Raises:
      UserError: it is something else, or a file.
    """
    if not workdir.exists():
        return
    if not workdir.is_dir():
        raise UserError(f"--workdir {workdir}: expected a folder, this is a file")
    table = _table(workdir / CONFIG)
    if table is not None and {"model", "data", "optim", "train"} <= table.keys():
        return
    ours = RUN_FILES + EXTRA_FILES
    names = [path.name for path in workdir.iterdir() if not path.name.startswith(".") and path.suffix != ".log"]
    others = sorted(name for name in names if name not in ours or (name == CONFIG and table is not None))
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(
            f"--workdir {workdir} holds other files ({', '.join(others[:3])}{more}) and no run; choose a new folder, "
            "or one of a run to resume it"
        )


def _table(path: epath.Path) -> dict[str, Any] | None:
    """The table in a JSON file; None where there is none, as in a damaged file."""
    try:
        plain = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return plain if isinstance(plain, dict) else None


def _compare(theirs: RunConfig, ours: RunConfig, what: str) -> None:
    wrong = [change for change in changes(theirs, ours) if not change.allowed]
    if wrong:
        lines = [f"  {change.name}: {change.old!r} there, {change.new!r} now" for change in wrong]
        lines += ["  (this one may only become larger)" for change in wrong if change.rule == "grows"]
        raise UserError(
            f"{what} Fields that differ:\n" + "\n".join(lines) + "\n"
            "Set them as they were to resume that run, or choose another --workdir. Nothing was changed."
        )


def resume_check(config: RunConfig, tokenizer: FileTokenizer) -> Check:
    """Refuses checkpoints that were trained with another config or tokenizer than a resumed run has."""

    def check(checkpoint: str, saved: dict[str, Any], fingerprint: str | None) -> None:
        theirs = config_of(saved, f"checkpoint {checkpoint}")
        _compare(theirs, config, f"Checkpoint {checkpoint} is of another config than the workdir's {CONFIG}.")
        _check_fingerprint(checkpoint, fingerprint, tokenizer)

    return check


def use_check(workdir: epath.PathLike, config: RunConfig, tokenizer: FileTokenizer | None) -> Check:
    """Refuses checkpoints that do not belong to the model and the tokenizer in their workdir."""

    def check(checkpoint: str, saved: dict[str, Any], fingerprint: str | None) -> None:
        theirs = config_of(saved, f"checkpoint {checkpoint}")
        differing = changes(theirs, config)
        wrong = [
            f"  {change.name}: {change.old!r} in the checkpoint, {change.new!r} in {CONFIG}"
            for change in differing
            if change.name.startswith(("model.", "data.tokenizer.")) and not change.allowed
        ]
        if wrong:
            raise UserError(
                f"{epath.Path(workdir) / CONFIG} is not the config that checkpoint {checkpoint} was trained with:\n"
                + "\n".join(wrong) + "\nSet these fields as they are in the checkpoint.",
                status=1,
            )  # fmt: skip
        _check_fingerprint(checkpoint, fingerprint, tokenizer)

    return check


def _check_fingerprint(checkpoint: str, fingerprint: str | None, tokenizer: FileTokenizer | None) -> None:
    if fingerprint is not None and tokenizer is not None and tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"checkpoint {checkpoint} was trained with another tokenizer than the workdir's {tokenizer.file_name}: its "
            f"fingerprint is {fingerprint}, that of the file {tokenizer.fingerprint}. Put the run's own file back.",
            status=1,
        )


def check_shared(workdir: epath.Path) -> None:
    """Refuses a workdir that is not the same place for all processes of the job."""
    mark = workdir / f".mark-{all_gather_hosts(np.int32(os.getpid()))[0]}"
    if jax.process_index() == 0:
        mark.write_bytes(b"")
    all_gather_hosts(np.int32(0))  # it is written
    blind = np.flatnonzero(all_gather_hosts(np.int32(not mark.exists())))
    if jax.process_index() == 0:
        mark.unlink()
    if blind.size:
        raise UserError(
            f"--workdir {workdir}: what the first process writes there, process {', '.join(map(str, blind))} does not "
            "see. Choose a folder on a disk that all hosts share, or in a bucket (gs://...)."
        )


def check_space(workdir: epath.Path, config: RunConfig, shapes: TrainState) -> None:
    """Refuses a disk on which the run's checkpoints have no room; of a bucket nothing is known."""
    if atomic.is_remote(workdir):
        return
    keep, memory = config.checkpoint.keep, _bytes(shapes.memory)
    there = saved_steps(workdir)
    with_memory = [step for step in there if (workdir / FOLDER / str(step) / "memory").exists()] if memory else there
    # One more than is kept, because an old checkpoint is removed only when the new one is complete.
    missing = max(1, keep + 1 - len(with_memory))
    needed, words = missing * _bytes(shapes), f"{missing} checkpoints of {_bytes(shapes) / 2**20:,.1f} MiB"
    if memory and config.checkpoint.memory_every > 1:  # the newest `keep` are kept, and the newest `keep` with memory
        light, one = max(0, keep - (len(there) - len(with_memory))), _bytes(shapes) - memory
        needed, words = needed + light * one, f"{words} and {light} without memory of {one / 2**20:,.1f} MiB"
    place = next(place for place in (workdir, *workdir.absolute().parents) if place.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"--workdir {workdir} has {free / 2**20:,.1f} MiB free, but {words} are still to be written; training has "
            "not begun. Free some space, lower checkpoint.keep, or choose another --workdir.",
            status=1,
        )


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def owned(workdir: epath.PathLike) -> Iterator[WorkdirLock | None]:
    """Makes and locks a workdir; where the run is refused inside, folders that were made are removed again.

    Gives the lock, or None on processes other than the first.

    Raises:
      UserError: it cannot be reached or written to, or another process owns it.
    """
    path = open_path(workdir, "--workdir")
    missing = [] if atomic.is_remote(path) else [place for place in (path, *path.parents) if not place.exists()]
    with contextlib.ExitStack() as undo:

        def acquire() -> WorkdirLock | None:
            check_writable(path, "--workdir")
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--workdir {path} cannot be made: {error}", status=1) from error
            undo.callback(_remove_empty, missing)
            return undo.enter_context(WorkdirLock(path)) if jax.process_index() == 0 else None

        yield run_on_all_hosts(acquire)


def _remove_empty(folders: list[epath.Path]) -> None:
    with contextlib.suppress(OSError):  # the first that is not empty ends it
        for folder in folders:
            os.rmdir(folder)


def claim(workdir: epath.Path, config: RunConfig, tokenizer: FileTokenizer, exists: bool) -> None:
    """Makes the workdir this run's: first the tokenizer, then the config, each atomically; checkpoints come later.

    Args:
      workdir: locked by this process.
      config: of the run.
      tokenizer: of the run.
      exists: whether the workdir holds checkpoints of this run; else metrics of an earlier start are removed.
    Raises:
      UserError: nothing can be written.
    """
    if jax.process_index() != 0:
        return
    try:
        atomic.remove_temporaries(workdir)
        if not exists:
            metrics.remove(workdir)
            for name in TOKENIZERS:
                if name != tokenizer.file_name:
                    (workdir / name).unlink(missing_ok=True)
        if not exists or not (workdir / tokenizer.file_name).exists():
            atomic.write_file(workdir / tokenizer.file_name, tokenizer.serialized())
        plain = {**formats.stamp(), **to_dict(config)}
        atomic.write_file(workdir / CONFIG, json.dumps(plain, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--workdir {workdir}: {error}; training has not begun", status=1) from error
