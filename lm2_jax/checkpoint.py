"""Checkpoints of a run: Orbax writes them, and nothing that is damaged or not finite gets in or out unseen."""

import functools
import os
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lm2_jax.config import RunConfig, to_dict
from lm2_jax.errors import UserError
from lm2_jax.training.hosts import together
from lm2_jax.training.state import TrainState, with_average
from lm2_jax.types import Array, PyTree

FOLDER = "checkpoints"
# What Orbax, TensorStore and the disk raise when something cannot be written.
_REFUSALS = (OSError, ValueError, RuntimeError)


class Restored(NamedTuple):
    """A checkpoint read back."""

    state: TrainState
    first_loss: float | None  # of the run, the measure of divergence


class Checkpoints:
    """The checkpoints of one workdir, open for writing.

    Args:
      workdir: folder or bucket.
      config: of the run; `checkpoint` says how many are kept, `data.carry_state` whether memory belongs to them.
    """

    def __init__(self, workdir: epath.PathLike, config: RunConfig):
        self.folder = folder_of(workdir)
        self._config = config
        self._damaged: set[int] = set()
        for name in half_written(self.folder) if jax.process_index() == 0 else ():  # who then removes them
            _warn(f"skipping the half-written checkpoint {self.folder / name}")
        self._manager = _Manager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Newest(self),
                cleanup_tmp_directories=True,
                save_root_metadata=False,
                # Made in the background, a folder that the disk refuses would show only after a timeout of minutes.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )

    def restore(self, targets: TrainState) -> Restored | None:
        """The newest checkpoint from which the run can go on exactly, or None where there is none at all.

        A damaged one is passed over with a warning, and so is, where a state is carried, one without memory.

        Args:
          targets: shapes, types and shardings of what is wanted.
        Raises:
          UserError: there are checkpoints, but none is usable.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            if targets.memory is not None and not (self.folder / str(step) / "memory").exists():
                _warn(
                    f"checkpoint {self.folder / str(step)} holds no memory (checkpoint.memory_every="
                    f"{self._config.checkpoint.memory_every}); the run goes on from the newest one that does"
                )
                continue
            try:
                return self._read(step, targets)
            except Exception as error:  # whatever the many layers below make of a damaged file
                self._damaged.add(step)
                _warn(f"skipping the damaged checkpoint {self.folder / str(step)}: {_brief(error)}", here=True)
        if steps:
            raise UserError(
                f"{self.folder}: none of the checkpoints {sorted(steps)} can be used, see above. "
                "Nothing was changed; move the folder away to begin anew, or choose another --workdir.",
                status=1,
            )
        return None

    def save(self, step: int, state: TrainState, first_loss: float | None, with_memory: bool = True) -> None:
        """Begins to write a checkpoint in the background; one that is still being written is waited for.

        Args:
          step: `state.step`, as the host counts it.
          state: the run after that step.
          first_loss: first loss of the run.
          with_memory: whether the carried memory is saved too; without it no run can go on from here exactly.
        Raises:
          UserError: the state is not finite, or the disk refuses; checkpoints before this one stay as they are.
        """
        items: dict[str, PyTree] = {"params": state.params, "opt_state": state.opt_state}
        if state.averaged is not None:
            items["averaged"] = state.averaged
        if state.memory is not None and with_memory:
            items["memory"] = _cast(state.memory, self._config.checkpoint.memory_dtype)
        sums, finite = jax.device_get(_inspect(items))
        if not finite:
            raise UserError(
                f"Training stopped: parameters or state after step {step} are not finite and were not saved. "
                f"{self.last_good()}",
                status=1,
            )
        position = {
            "step": step,
            "rows": self._config.data.rows,
            "first_loss": first_loss,
            "checksums": {name: [int(s) for s in values] for name, values in sums.items()},
        }
        args: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}  # pyright: ignore
        args["position"] = ocp.args.JsonSave(position)  # pyright: ignore[reportCallIssue]
        args["config"] = ocp.args.JsonSave(to_dict(self._config))  # pyright: ignore[reportCallIssue]
        try:
            self._manager.wait_until_finished()
            if step in self._manager.all_steps():  # damaged, or without memory: the run has come here again
                self._manager.delete(step)
                self._damaged.discard(step)
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except _REFUSALS as error:
            raise self._failed(error) from error

    def last_good(self) -> str:
        """A sentence that names the newest checkpoint that is completely written and not known to be damaged."""
        try:
            self._manager.wait_until_finished()
        except _REFUSALS as error:
            _warn(f"saving a checkpoint failed: {_brief(error)}", here=True)
        self._manager.reload()
        steps = set(self._manager.all_steps()) - self._damaged
        return f"Last good checkpoint: {self.folder / str(max(steps))}." if steps else "No checkpoint was saved yet."

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for what is being written; a failure there must not hide an error from before."""
        try:
            self._manager.wait_until_finished()
        except _REFUSALS as failure:
            if error is None:
                raise self._failed(failure) from failure
            _warn(f"saving a checkpoint failed: {_brief(failure)}", here=True)
        finally:
            self._manager.close()

    def complete(self, step: int) -> bool:
        """Whether the run could go on exactly from this checkpoint, as far as its folder shows."""
        if step in self._damaged:
            return False
        return not self._config.data.carry_state or (self.folder / str(step) / "memory").exists()

    def damaged(self, step: int) -> bool:
        """Whether this checkpoint was found damaged."""
        return step in self._damaged

    def _read(self, step: int, targets: TrainState) -> Restored:
        wanted: dict[str, PyTree] = {"params": targets.params, "opt_state": targets.opt_state}
        if targets.averaged is not None:
            wanted["averaged"] = targets.averaged
        if targets.memory is not None:
            wanted["memory"] = _retype(targets.memory, self._config.checkpoint.memory_dtype)
        items, position = read_items(self.folder, step, wanted)
        memory = None
        if targets.memory is not None:
            memory = jax.tree.map(lambda x, to: x.astype(to.dtype), items["memory"], targets.memory)
        place = targets.step.sharding
        counter = jax.device_put(np.int32(step), place) if place is not None else jnp.int32(step)
        state = TrainState(counter, items["params"], items["opt_state"], memory, items.get("averaged"))
        return Restored(state, position["first_loss"])

    def _failed(self, error: Exception) -> UserError:
        return UserError(
            f"{self.folder}: saving a checkpoint failed: {_brief(error)}. Checkpoints before it are unharmed; "
            "free some space (or lower checkpoint.keep) and run the same command again.",
            status=1,
        )


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which does not ask jax whether the job is to stop: the training loop does.

    What is asked with a step of the past, as Orbax does in the background when a save is complete, would make jax
    count from there when the hosts agree on the step to stop at, and some may have passed it.
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


def read_items(folder: epath.Path, step: int, wanted: dict[str, PyTree]) -> tuple[dict[str, Any], Any]:
    """Items of one checkpoint, and its position, proved by their checksums; on all processes or on none.

    Args:
      folder: of the checkpoints.
      step: which.
      wanted: trees of shapes by item name.
    Raises:
      ValueError: what is read is not what was written; or whatever Orbax raises over a damaged file.
      UserError: it could be read here, but not on another process.
    """
    _hush_late_reads()
    items, position = together(lambda: _read_files(folder / str(step), wanted))
    sums, _ = jax.device_get(_inspect(items))
    for name, values in sums.items():
        if [int(s) for s in values] != position["checksums"][name]:
            raise ValueError(f"{name}: the arrays differ from those that were saved")
    return items, position


def _read_files(folder: epath.Path, wanted: dict[str, PyTree]) -> tuple[dict[str, Any], Any]:
    """What this process needs of a checkpoint.

    Not through the manager, in which the processes wait for each other: where a file is damaged that only some of
    them read, it would wait for ever.
    """
    handler, texts = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
    try:
        items = {
            name: handler.restore(folder / name, args=ocp.args.StandardRestore(tree))  # pyright: ignore
            for name, tree in wanted.items()
        }
        return items, texts.restore(folder / "position", args=ocp.args.JsonRestore())
    finally:
        handler.close()
        texts.close()


def read_params(workdir: epath.PathLike, shapes: PyTree, averaged: PyTree = None) -> tuple[PyTree, int]:
    """Parameters of the newest checkpoint that is intact, and its step; nothing in the workdir changes.

    Args:
      workdir: folder or bucket of a run.
      shapes: of the parameters, with shardings where they matter.
      averaged: likewise, of their moving average where the run keeps one; it is what is then returned.
    Raises:
      UserError: there is no usable checkpoint.
    """
    folder = folder_of(workdir)
    if not folder.exists():
        raise UserError(f"{workdir}: no checkpoint there yet; expected a folder {FOLDER!r} with one", status=1)
    manager = ocp.CheckpointManager(
        folder, options=ocp.CheckpointManagerOptions(create=False, save_root_metadata=False)
    )
    try:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                wanted = {"params": shapes} | ({} if averaged is None else {"averaged": averaged})
                items = read_items(folder, step, wanted)[0]
                params = items["params"]
                return (params if averaged is None else with_average(params, items["averaged"])), step
            except Exception as error:  # whatever the many layers below make of a damaged file
                _warn(f"skipping the damaged checkpoint {folder / str(step)}: {_brief(error)}")
    finally:
        manager.close()
    raise UserError(f"{folder}: no usable checkpoint there", status=1)


def folder_of(workdir: epath.PathLike) -> epath.Path:
    """The checkpoints of a workdir; absolute where it is local, as Orbax wants it, and a bucket as it is."""
    path = os.fspath(workdir)
    return epath.Path(path if "://" in path else os.path.abspath(path)) / FOLDER


def half_written(folder: epath.PathLike) -> list[str]:
    """Names of what an interrupted save left behind."""
    folder = epath.Path(folder)
    return sorted(path.get().name for path in ocp.utils.tmp_checkpoints(folder))


@jax.jit
def _inspect(items: dict[str, PyTree]) -> tuple[dict[str, Array], Array]:
    """Per item the checksums of its arrays, and whether everything is finite.

    A checksum is the sum of an array's bits modulo 2^32: any change of values shows, however they are sharded, and
    no file has to be read again.
    """
    leaves = [leaf for leaf in jax.tree.leaves(items) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    finite = functools.reduce(jnp.logical_and, (jnp.all(jnp.isfinite(leaf)) for leaf in leaves), jnp.array(True))
    sums = {
        name: jnp.stack([_bit_sum(leaf) for leaf in jax.tree.leaves(tree)] or [jnp.uint32(0)])
        for name, tree in items.items()
    }
    return sums, finite


def _bit_sum(x: Array) -> Array:
    if x.dtype == bool:
        return jnp.sum(x, dtype=jnp.uint32)
    word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    return jnp.sum(jax.lax.bitcast_convert_type(x, word), dtype=jnp.uint32)


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


def _brief(error: Exception) -> str:
    """First line of what lies behind an exception, of a length that fits a message."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


@functools.cache
def _hush_late_reads() -> None:
    """Keeps one kind of noise off the terminal.

    When one file of a checkpoint is damaged, Orbax gives up at once and closes its event loop; the reads of the other
    files end later or are dropped, and Python prints a traceback for each though nothing more is wrong.
    """
    show = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        closed = isinstance(error, RuntimeError) and "Event loop is closed" in str(error)
        dropped = error is not None and isinstance(error.__cause__, GeneratorExit)
        if not (closed or dropped):
            show(unraisable)

    sys.unraisablehook = hook


def _warn(message: str, here: bool = False) -> None:
    """Prints a warning, on the first process, or wherever it is `here` that something failed."""
    if here or jax.process_index() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)
