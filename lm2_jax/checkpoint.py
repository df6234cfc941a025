"""Checkpoints of a run, written by Orbax: complete, finite, verified by checksums, and tied to config and tokenizer."""

import contextlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from lm2_jax import checkpoint_files as files
from lm2_jax.atomic import is_remote
from lm2_jax.checkpoint_storage import half_written
from lm2_jax.config import RunConfig, to_dict
from lm2_jax.errors import UserError
from lm2_jax.library_logs import drop_late_work, quiet_libraries
from lm2_jax.training.hosts import FailedElsewhere, from_first_process, run_on_all_hosts
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
        self._damaged: set[int] = set()  # found by `restore`; the same on all processes, as what is kept depends on it
        self._saved: int | None = None  # the last step that was given to `save`
        self._writing: Future[list[int]] | None = None  # a save in the background
        self._failure: Exception | None = None  # of a save in the background, until `finish` raises it
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._exit = contextlib.ExitStack()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path = self._exit.enter_context(files.library_path(self.folder))
            self._exit.enter_context(quiet_libraries())
            if jax.process_index() == 0:
                for name in half_written(self._path):
                    _warn(f"removing the incomplete checkpoint {self.folder / name}")
                    (self._path / name).rmtree()
            # As the first process sees them; the same on all processes from here on.
            self._steps = set(from_first_process(lambda: _steps_in(self._path)))
            self._with_memory = set(from_first_process(lambda: [s for s in sorted(self._steps) if self._has_memory(s)]))
        except BaseException as error:
            self._exit.close()
            if isinstance(error, _REFUSALS):
                raise UserError(f"{self.folder} cannot be opened: {self._brief(error)}", status=1) from error
            raise

    def restore(self, targets: TrainState) -> Restored | None:
        """The newest checkpoint from which the run can resume exactly, or None where there is none at all.

        A damaged one is skipped with a warning, and so is, where a state is carried, one without memory. All processes
        read the same one.

        Args:
          targets: shapes, types and shardings of the result.
        Raises:
          UserError: there are checkpoints, but none is usable; or the newest belongs to another run.
        """
        steps = sorted(self._steps)
        for step in reversed(steps):
            where = self.folder / str(step)
            if jax.tree.leaves(targets.memory) and step not in self._with_memory:
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
                drop_late_work()
                _warn(f"skipping the damaged checkpoint {where}: {self._brief(error)}", always=True)
        if steps:
            raise UserError(
                f"{self.folder}: none of the checkpoints {steps} can be used, see above. Nothing was changed; "
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
          with_memory: whether the carried memory is saved too; without it no run can resume exactly from here. It is
            always saved where there is no complete checkpoint yet.
        Raises:
          UserError: the state is not finite, or this or the previous checkpoint cannot be written; those before stay
            as they are.
        """
        items = _items(state)
        if "memory" in items:
            items["memory"] = _cast(items["memory"], self._config.checkpoint.memory_dtype)
        if not with_memory and any(map(self.complete, self._with_memory)):
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
        self._saved = step
        try:
            # One that is there, damaged or without memory, is replaced: the run has come here again.
            response = files.save(self._path / str(step), items, record, config)
            self._steps.add(step)
            self._damaged.discard(step)
            (self._with_memory.add if "memory" in items else self._with_memory.discard)(step)
            self._writing = self._background.submit(self._finish_save, response, self._outdated())
        except _REFUSALS as error:
            self._failure = error
            self._raise_failure()

    def finish(self) -> str:
        """Waits until everything is written; the first process then reads the last checkpoint back, see `last_good`.

        Returns:
          On the first process `last_good()`, on others an empty string.
        Raises:
          UserError: the last checkpoint could not be written or read back.
        """
        self._wait()
        self._raise_failure()
        return run_on_all_hosts(lambda: self._read_last() if jax.process_index() == 0 else "")

    def last_good(self) -> str:
        """A sentence that names the newest checkpoint that a run can resume from, as far as this process can see.

        Its record, its config and one of its arrays are read back and compared with their checksums, on this process
        alone: a fault in another array is found only by `restore`. A damaged one is named in a warning; it changes
        nothing in what is kept.
        """
        self._wait()
        step = self._newest_good()
        return "There is no good checkpoint." if step is None else f"Last good checkpoint: {self.folder / str(step)}."

    def complete(self, step: int) -> bool:
        """Whether the run could resume exactly from this checkpoint, as far as this process knows without reading it.

        It is not known to be damaged and, where a state is carried, was saved with memory.
        """
        model = self._config.model
        carries = self._config.data.carry_state and (model.has_memory or model.decoder.carries_keys)
        return step not in self._damaged and (not carries or step in self._with_memory)

    def damaged(self, step: int) -> bool:
        """Whether `restore` found this checkpoint damaged."""
        return step in self._damaged

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for what is being written; a failure there must not hide an error from before."""
        self._wait()
        self._background.shutdown()
        self._exit.close()
        if error is None:
            self._raise_failure()
        elif self._failure is not None:
            _warn(f"saving a checkpoint failed: {self._brief(self._failure)}", always=True)

    def _has_memory(self, step: int) -> bool:
        return (self._path / str(step) / "memory").exists()

    def _newest_good(self) -> int | None:
        """The step that `last_good` names; warns about newer ones that are damaged."""
        with contextlib.suppress(*_REFUSALS):
            for step in filter(self.complete, reversed(_steps_in(self._path))):
                try:
                    files.confirm(self._path, step)
                    return step
                except Exception as error:  # see `restore`
                    drop_late_work()
                    _warn(f"checkpoint {self.folder / str(step)} is damaged: {self._brief(error)}", always=True)
        return None

    def _read_last(self) -> str:
        last = self.last_good()
        if self._saved is not None and last != f"Last good checkpoint: {self.folder / str(self._saved)}.":
            raise UserError(
                f"checkpoint {self.folder / str(self._saved)} was written, but cannot be read back. {last} Run the "
                "same command again.",
                status=1,
            )
        return last

    def _outdated(self) -> list[int]:
        """The steps that go once the newest is complete: not of the newest `keep`, nor of the newest `keep` complete.

        Damaged ones do not count and stay. All processes must decide the same, so nothing is looked up on the disk.
        """
        keep = self._config.checkpoint.keep
        intact = sorted(self._steps - self._damaged)
        complete = [step for step in intact if self.complete(step)]
        return sorted({*intact} - {*intact[-keep:], *complete[-keep:]})

    def _finish_save(self, response: ocp.AsyncResponse[None], outdated: list[int]) -> list[int]:
        """In the background: once a checkpoint is complete, removes `outdated` ones and returns them."""
        response.result()
        if jax.process_index() == 0:
            for step in outdated:
                (self._path / str(step)).rmtree()
        return outdated

    def _wait(self) -> None:
        if self._writing is None:
            return
        try:
            self._steps.difference_update(self._writing.result())
        except _REFUSALS as error:
            self._failure = self._failure or error
            drop_late_work()
        self._writing = None

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
        return files.brief(error).replace(str(getattr(self, "_path", self.folder)), str(self.folder))


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
                cause = files.brief(error).replace(str(path), str(folder))
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
    return _steps_in(folder_of(workdir))


def _steps_in(folder: epath.Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def folder_of(workdir: epath.PathLike) -> epath.Path:
    """The checkpoints of a workdir: an absolute path, or a bucket as it is."""
    path = os.fspath(workdir)
    return epath.Path(path if is_remote(path) else os.path.abspath(path)) / FOLDER


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
