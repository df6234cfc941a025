"""Trees of arrays and tables on the disk or in a bucket: all calls of Orbax."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath
from orbax.checkpoint import v1 as ocp

from lm2_jax.types import PyTree


def save(
    folder: epath.Path, trees: Mapping[str, PyTree], tables: Mapping[str, dict[str, Any]]
) -> ocp.AsyncResponse[None]:
    """Begins to write one checkpoint in the background, in place of one that is there; all processes must call this.

    Args:
      folder: of the checkpoint.
      trees: of arrays, by the name of an item.
      tables: of JSON types, by the name of an item.
    Returns:
      Its `result()` waits until the checkpoint is complete, and raises what went wrong.
    """
    context, registry = ocp.Context(), ocp.handlers.local_registry()
    for name in tables:  # else they would be trees, too
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context.checkpointables.registry = registry
    # Made in the background, a folder that the disk refuses would show only after minutes.
    context.asynchronous.create_directories_asynchronously = False
    # Not through Orbax's `training.Checkpointer`: with each save, and again in the background, it asks jax whether the
    # job is to stop, with a step of the past. jax would count from there when the hosts agree on the step to stop at,
    # and some may have passed it. The training loop alone asks.
    with context:
        return ocp.save_checkpointables_async(folder, {**trees, **tables}, overwrite=True)


def load_arrays(folder: epath.Path, like: PyTree, partial: bool = False) -> PyTree:
    """The arrays of one item; each process reads by itself.

    Args:
      folder: of the item.
      like: tree of shapes with shardings; `np.ndarray` in the place of one gives an array of the host as it was saved.
      partial: whether the item may have more arrays than `like`.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    return _load(ocp.handlers.PyTreeHandler(context=context), folder, like)


def load_table(folder: epath.Path) -> Any:
    """The table of one item; each process reads by itself."""
    return _load(ocp.handlers.JsonHandler(), folder, None)


def half_written(folder: epath.PathLike) -> list[str]:
    """Names of what an interrupted save left among the checkpoints of a folder."""
    folder = epath.Path(folder)
    finished = {str(found.step) for found in ocp.path.step.standard_name_format().find_all(folder)}
    names = {path.name for path in folder.iterdir() if path.name.partition(".")[0].isdigit()}
    return sorted(names - finished)


def _load(handler: ocp.handlers.CheckpointableHandler[Any, Any], folder: epath.Path, like: PyTree) -> Any:
    """Not Orbax's `load_checkpointables`, in which the processes wait for each other and count their calls.

    Where a file is damaged that only some of them read, they would wait for ever, then or in the next save.
    """

    async def read() -> Any:
        return await (await handler.load(folder, like))

    with ThreadPoolExecutor(1) as thread:  # the caller's may run an event loop already, as in a notebook
        return thread.submit(asyncio.run, read()).result()
