"""A workdir before anything is trained in it: whose is it, and can it be written to?"""

import json
import os
import shutil
from typing import Any

import jax
import numpy as np
from etils import epath

from lm2_jax.checkpoint import FOLDER
from lm2_jax.config import RunConfig, from_dict, to_dict
from lm2_jax.data.tokenizers import FileTokenizer, save_tokenizer
from lm2_jax.errors import UserError
from lm2_jax.training.hosts import everyone
from lm2_jax.training.metrics import is_remote
from lm2_jax.training.state import TrainState

CONFIG = "config.json"
# Fields that change nothing of what a run computes or reads back; a resumed run may have them otherwise.
FREE_ON_RESUME = (
    "name",
    "data.prefetch",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.max_loss_ratio",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.memory_every",
)


def read_config(workdir: epath.PathLike) -> RunConfig:
    """The config of the run that a workdir holds; `UserError` where there is none or it is damaged."""
    return from_dict(RunConfig, _read_plain(workdir), f"{epath.Path(workdir) / CONFIG}: config")


def _read_plain(workdir: epath.PathLike) -> Any:
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        raise UserError(f"{workdir}: no run there; expected a folder with {CONFIG}, as train.py writes it")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: damaged, not a JSON file ({error})", status=1) from error


def check_owner(workdir: epath.Path, config: RunConfig) -> bool:
    """Whether the workdir holds a run already, which must be one of this config.

    Raises:
      UserError: it is another config's, with the fields that differ.
    """
    if not (workdir / CONFIG).exists():
        if (workdir / FOLDER).exists():
            raise UserError(
                f"{workdir} has {FOLDER}/ but no {CONFIG} that says whose they are; choose another --workdir"
            )
        return False
    theirs, ours = _flat(_read_plain(workdir)), _flat(to_dict(config))
    lines = [
        f"  {name}: {theirs.get(name, '<absent>')!r} there, {ours.get(name, '<absent>')!r} now"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name, "<absent>") != ours.get(name, "<absent>") and name not in FREE_ON_RESUME
    ]
    if lines:
        raise UserError(
            f"{workdir} belongs to a run of another config. Fields that differ:\n" + "\n".join(lines) + "\n"
            "Set them as they were to go on with that run, or choose another --workdir. Nothing was changed."
        )
    return True


def _flat(plain: Any, path: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    if not isinstance(plain, dict):
        return {path: plain}
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        flat |= _flat(value, f"{path}.{name}" if path else name)
    return flat


def check_writable(workdir: epath.Path) -> None:
    """Writes and removes a probe; a workdir that cannot be made or written to is a `UserError`."""
    probe = workdir / f".probe-{jax.process_index()}-{os.getpid()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(1 << 16))
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir {workdir} cannot be written to ({error}); training has not begun. Choose another one, or "
            "make it writable.",
            status=1,
        ) from error


def check_shared(workdir: epath.Path) -> None:
    """Refuses a workdir that is not the same place for all processes of the job."""
    mark = workdir / f".mark-{everyone(np.int32(os.getpid()))[0]}"
    if jax.process_index() == 0:
        mark.write_bytes(b"")
    everyone(np.int32(0))  # it is written
    blind = np.flatnonzero(everyone(np.int32(not mark.exists())))
    if jax.process_index() == 0:
        mark.unlink()
    if blind.size:
        raise UserError(
            f"--workdir {workdir}: what the first process writes there, process {', '.join(map(str, blind))} does not "
            "see. Choose one on a disk that all hosts share, or in a bucket (gs://...)."
        )


def check_space(workdir: epath.Path, config: RunConfig, shapes: TrainState) -> None:
    """Refuses a disk on which the run's checkpoints have no room; of a bucket nothing is known."""
    if is_remote(workdir):
        return
    one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    folder = workdir / FOLDER
    there = sum(path.name.isdigit() for path in folder.iterdir()) if folder.exists() else 0
    # One more than is kept, because an old checkpoint goes only when the new one is complete.
    missing = max(1, config.checkpoint.keep + 1 - there)
    free = shutil.disk_usage(workdir).free
    if free < missing * one:
        raise UserError(
            f"--workdir {workdir} has {free / 2**20:,.1f} MiB free, but {missing} checkpoints of {one / 2**20:,.1f} "
            "MiB are still to be written; training has not begun. Free some space, lower checkpoint.keep, or choose "
            "another --workdir.",
            status=1,
        )


def claim(workdir: epath.Path, config: RunConfig, tokenizer: FileTokenizer) -> None:
    """Makes the workdir this run's: first the tokenizer, then the config, whose presence says that both are whole."""
    if jax.process_index() != 0:
        return
    save_tokenizer(tokenizer, workdir)
    fresh = workdir / f"{CONFIG}.new"
    fresh.write_text(json.dumps(to_dict(config), indent=1) + "\n")
    fresh.replace(workdir / CONFIG)
