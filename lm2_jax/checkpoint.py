"""Checkpoints of a run, written by Orbax: complete, finite, verified by checksums, and tied to config and tokenizer."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lm2_jax import checkpoint_files as files
from lm2_jax.atomic import is_remote
from lm2_jax.config import RunConfig, to_dict
from lm2_jax.errors import UserError
from lm2_jax.library_logs import drop_late_work, quiet_libraries
from lm2_jax.training.hosts import FailedElsewhere, run_on_all_hosts
from lm2_jax.training.state import TrainState
from lm2_jax.types import PyTree

FOLDER = "checkpoints"
# What Orbax, TensorStore and the disk raise when something cannot be written.
_REFUSALS = (OSError, ValueError, RuntimeError)

Check = Callable[[str, dict[str, Any], str | None], None]
"""Raises a `UserError` where a checkpoint (its path, config as JSON types, fingerprint of its tokenizer) is not one of
this run."""


class Restored(NamedTuple):
    """A checkpoint read back."""

    state: TrainState
    first_loss: float | None  # of the run, the measure of divergence


class Checkpoints:
    """The checkpoints of one workdir, open for writing by one run at a time.

    Args:
      workdir: folder or bucket.
      config: of the run; `checkpoint` says how many are kept, `data.carry_state` whether memory belongs to them.
      tokenizer: fingerprint, which is recorded in every checkpoint.
      check: refuses checkpoints of another run; None: they are not compared.
    """

    def __init__(
        self, workdir: epath.PathLike, config: RunConfig, tokenizer: str | None = None, check: Check | None = None
    ):
        self.folder = folder_of(workdir)
        self._config, self._tokenizer, self._check = config, tokenizer, check
        self._damaged: set[int] = set()
        self._failure: Exception | None = None  # of a save in the background, until `finish` raises it
        self._exit = contextlib.ExitStack()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path = self._exit.enter_context(files.library_path(self.folder))
            self._exit.enter_context(quiet_libraries())
            for name in half_written(self._path) if jax.process_index() == 0 else ():  # Orbax removes them
                _warn(f"removing the incomplete checkpoint {self.folder / name}")
            self._manager = _Manager(
                self._path,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_Newest(self),
                    cleanup_tmp_directories=True,
                    save_root_metadata=False,
                    # Made in the background, a folder that the disk refuses would show only after minutes.
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                ),
            )
        except BaseException as error:
            self._exit.close()
            if isinstance(error, _REFUSALS):
                raise UserError(f"{self.folder} cannot be opened: {self._brief(error)}", status=1) from error
            raise

    def restore(self, targets: TrainState) -> Restored | None:
        """The newest checkpoint from which the run can resume exactly, or None where there is none at all.

        A damaged one is skipped with a warning, and so is, where a state is carried, one without memory.

        Args:
          targets: shapes, types and shardings of the result.
        Raises:
          UserError: there are checkpoints, but none is usable; or the newest belongs to another run.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            where = self.folder / str(step)
            if jax.tree.leaves(targets.memory) and not (self._path / str(step) / "memory").exists():
                _warn(
                    f"checkpoint {where} holds no memory (checkpoint.memory_every="
                    f"{self._config.checkpoint.memory_every}); the run resumes from the newest one that does"
                )
                continue
            try:
                return self._read(step, targets)
            except Exception as error:  # whatever the many layers below make of a damaged file
                if isinstance(error, UserError) and not isinstance(error, FailedElsewhere):
                    raise
                self._damaged.add(step)
                _warn(f"skipping the damaged checkpoint {where}: {self._brief(error)}", always=True)
        if steps:
            raise UserError(
                f"{self.folder}: none of the checkpoints {sorted(steps)} can be used, see above. Nothing was changed; "
                "move the folder away to start again, or choose another --workdir.",
                status=1,
            )
        return None

    def save(self, step: int, state: TrainState, first_loss: float | None, with_memory: bool = True) -> None:
        """Begins to write a checkpoint in the background, after the one that is still being written.

        Args:
          step: `state.step`, as the host counts it.
          state: the run after that step.
          first_loss: first loss of the run.
          with_memory: whether the carried memory is saved too; without it no run can resume exactly from here.
        Raises:
          UserError: the state is not finite, or this or the previous checkpoint cannot be written; those before stay
            as they are.
        """
        items = _items(state)
        if "memory" in items:
            items["memory"] = _cast(items["memory"], self._config.checkpoint.memory_dtype)
        if not with_memory:
            items.pop("memory", None)
        sums, finite = files.checksums(items)
        if not finite:
            raise UserError(
                f"Training stopped: parameters or state after step {step} are not finite and were not saved. "
                f"{self.last_good()}",
                status=1,
            )
        config = to_dict(self._config)
        rows = self._config.data.rows
        record = files.record_of(sums, config, step=step, rows=rows, first_loss=first_loss, tokenizer=self._tokenizer)
        self._wait()
        self._raise_failure()
        try:
            if step in self._manager.all_steps():  # damaged, or without memory: the run has come here again
                self._manager.delete(step)
                self._damaged.discard(step)
            self._manager.save(step, args=files.save_args(items, record, config), force=True)
        except _REFUSALS as error:
            self._failure = error
            self._raise_failure()

    def finish(self) -> str:
        """Waits until everything is written and reads the newest checkpoint back.

        Returns:
          `last_good()`.
        Raises:
          UserError: the last checkpoint could not be written.
        """
        self._wait()
        self._raise_failure()
        return self.last_good()

    def last_good(self) -> str:
        """A sentence that names the newest checkpoint that is complete and could be read back."""
        self._wait()
        with contextlib.suppress(*_REFUSALS):
            self._manager.reload()
            for step in sorted(set(self._manager.all_steps()) - self._damaged, reverse=True):
                try:
                    if jax.process_index() == 0:
                        files.confirm(self._path, step)
                    return f"Last good checkpoint: {self.folder / str(step)}."
                except Exception as error:  # see `restore`
                    self._damaged.add(step)
                    _warn(f"checkpoint {self.folder / str(step)} is damaged: {self._brief(error)}", always=True)
        return "There is no good checkpoint."

    def complete(self, step: int) -> bool:
        """Whether the run could resume exactly from this checkpoint, as far as its folder shows."""
        if step in self._damaged:
            return False
        model = self._config.model
        has_state = model.has_memory or (model.decoder.window_tokens or 1) > 1
        carries = self._config.data.carry_state and has_state
        return not carries or (self._path / str(step) / "memory").exists()

    def damaged(self, step: int) -> bool:
        """Whether this checkpoint was found damaged."""
        return step in self._damaged

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for what is being written; a failure there must not hide an error from before."""
        self._wait()
        with contextlib.suppress(*_REFUSALS):
            self._manager.close()
        self._exit.close()
        if error is None:
            self._raise_failure()
        elif self._failure is not None:
            _warn(f"saving a checkpoint failed: {self._brief(self._failure)}", always=True)

    def _wait(self) -> None:
        try:
            self._manager.wait_until_finished()
        except _REFUSALS as error:
            self._failure = self._failure or error
            drop_late_work()

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        cause, self._failure = self._brief(self._failure), None
        drop_late_work()
        raise UserError(
            f"{self.folder}: saving a checkpoint failed: {cause}. {self.last_good()} Free some space (or lower "
            "checkpoint.keep) and run the same command again.",
            status=1,
        ) from None  # the frames of the failure keep Orbax's half-done work alive until the process ends

    def _read(self, step: int, targets: TrainState) -> Restored:
        _check_record(self._path, self.folder, step, self._check)
        wanted = _items(targets)
        if "memory" in wanted:
            wanted["memory"] = _retype(wanted["memory"], self._config.checkpoint.memory_dtype)
        items, record = files.read_items(self._path, step, wanted)
        if "memory" in items:
            items["memory"] = jax.tree.map(lambda x, to: x.astype(to.dtype), items["memory"], targets.memory)
        place = targets.step.sharding
        counter = jax.device_put(np.int32(step), place) if place is not None else jnp.int32(step)
        return Restored(targets._replace(step=counter, **items), record["first_loss"])

    def _brief(self, error: BaseException) -> str:
        return brief(error).replace(str(getattr(self, "_path", self.folder)), str(self.folder))


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which does not ask jax whether the job is to stop: the training loop does.

    Orbax asks in the background when a save is complete, with a step of the past. That would make jax count from there
    when the hosts agree on the step to stop at, and some may have passed it.
    """

    def reached_preemption(self, step: int) -> bool:
        """Never: a save is one like any other."""
        return False


class _Newest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest `keep` checkpoints and the newest `keep` complete ones; damaged ones do not count."""

    def __init__(self, owner: Checkpoints):
        self._owner = owner

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """See Orbax; `checkpoints` come with the oldest first, the one that is being written included."""
        owner, keep = self._owner, self._owner._config.checkpoint.keep
        steps = [info.step for info in checkpoints]
        intact = [step for step in steps if not owner.damaged(step)]
        # The one being written counts as incomplete: what it would replace stays until the next is written.
        complete = [step for step in intact if owner.complete(step)]
        kept = {*intact[-keep:], *complete[-keep:]}
        return [step in kept or owner.damaged(step) for step in steps]


def read_newest(
    workdir: epath.PathLike, wanted: dict[str, PyTree], check: Check | None = None
) -> tuple[dict[str, Any], int]:
    """Items of the newest checkpoint that is intact, and its step; nothing in the workdir changes.

    Args:
      workdir: folder or bucket of a run.
      wanted: shapes, with shardings where they matter, by the name of a field of `TrainState`.
      check: refuses a checkpoint that does not belong to the workdir's config and tokenizer.
    Raises:
      UserError: there is no usable checkpoint.
    """
    folder = folder_of(workdir)
    steps = saved_steps(workdir)
    if not steps:
        raise UserError(f"{workdir}: no checkpoint there yet; expected a folder {FOLDER!r} with one", status=1)
    with files.library_path(folder) as path:
        for step in reversed(steps):
            try:
                with quiet_libraries():
                    _check_record(path, folder, step, check)
                    return files.read_items(path, step, wanted)[0], step
            except Exception as error:  # whatever the many layers below make of a damaged file
                if isinstance(error, UserError) and not isinstance(error, FailedElsewhere):
                    raise
                cause = brief(error).replace(str(path), str(folder))
                _warn(f"skipping the damaged checkpoint {folder / str(step)}: {cause}")
    raise UserError(f"{folder}: no usable checkpoint there", status=1)


def _check_record(path: epath.Path, folder: epath.Path, step: int, check: Check | None) -> None:
    """Reads the record of a checkpoint, on all processes or on none, and compares it with the run."""

    def read() -> None:
        record, config = files.read_record(path, step)
        if check is not None:
            check(str(folder / str(step)), config, record.get("tokenizer"))

    run_on_all_hosts(read)


def saved_steps(workdir: epath.PathLike) -> list[int]:
    """The steps of all checkpoints that were written to their end, in order; they may be damaged since."""
    folder = folder_of(workdir)
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def folder_of(workdir: epath.PathLike) -> epath.Path:
    """The checkpoints of a workdir: an absolute path, or a bucket as it is."""
    path = os.fspath(workdir)
    return epath.Path(path if is_remote(path) else os.path.abspath(path)) / FOLDER


def half_written(folder: epath.PathLike) -> list[str]:
    """Names of what an interrupted save left."""
    folder = epath.Path(folder)
    return sorted(path.get().name for path in ocp.utils.tmp_checkpoints(folder))


def brief(error: BaseException) -> str:
    """The cause of an exception in one line that fits a message."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r" \[(tensorstore_spec|os_error_code|source_locations)=.*", "", lines[0])
    if len(text) > 200:  # TensorStore names layer after layer; the system's own words come last
        text = text.rsplit('": ', 1)[-1]
    return f"{type(error).__name__}: {text[:300]}"


def _items(state: TrainState) -> dict[str, PyTree]:
    """The trees of a train state that a checkpoint holds as items of their own."""
    return {name: tree for name, tree in state._asdict().items() if name != "step" and jax.tree.leaves(tree)}


def _cast(memory: PyTree, dtype: str | None) -> PyTree:
    """Floating-point arrays in `dtype`; None changes nothing."""
    if dtype is None:
        return memory
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, memory)


def _retype(shapes: PyTree, dtype: str | None) -> PyTree:
    """The shapes of `_cast`'s result."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        wanted = x.dtype if dtype is None or not jnp.issubdtype(x.dtype, jnp.floating) else jnp.dtype(dtype)
        return jax.ShapeDtypeStruct(x.shape, wanted, sharding=getattr(x, "sharding", None))

    return jax.tree.map(one, shapes)


def _warn(message: str, always: bool = False) -> None:
    """Prints a warning, on the first process, or `always` on the one where something failed."""
    if always or jax.process_index() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)
