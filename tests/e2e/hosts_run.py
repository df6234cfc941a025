"""`train.py` on a tiny run, as one process or one of several: it tells what it has, and can be held at a step.

python tests/e2e/hosts_run.py DOCUMENTS FOLDER [--hold-at-step N] [--heartbeat SECONDS] OPTIONS OF train.py
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from lm2_jax import cli
from lm2_jax.commands import train
from lm2_jax.config import OptimConfig, RunConfig
from lm2_jax.presets import PRESETS
from lm2_jax.training import fit
from lm2_jax.training.watch import Watch
from tests.contract.subjects import FLOAT64
from tests.e2e.tiny_run import tiny_config

NAME = "tiny_hosts"
STEPS, SAVE_EVERY = 8, 2
# Each of two processes with four devices has two of the four rows, and half of each parameter and of its moments.
MESH = ["--mesh.data", "1", "--mesh.fsdp", "4", "--mesh.slots", "2"]


def hosts_config(documents: pathlib.Path) -> RunConfig:
    """The tiny run that carries its memory on: in float64, of one layer, its sizes such that the mesh divides them."""
    run = tiny_config(documents, every_steps=SAVE_EVERY, keep=STEPS)
    memory = dataclasses.replace(run.model.memory, num_slots=8)
    decoder = dataclasses.replace(run.model.decoder, width=16, num_layers=1)
    return dataclasses.replace(
        run,
        name=NAME,
        model=dataclasses.replace(run.model, segment_tokens=16, memory=memory, decoder=decoder, precision=FLOAT64),
        optim=OptimConfig(steps=STEPS, warmup_steps=2),
    )


def wait_for(done: Any) -> None:
    while not done():
        time.sleep(0.05)


def hold_at_step(last: int, folder: pathlib.Path) -> None:
    """Says that the report of a step has been read, and waits until it may go on."""
    read = Watch.read

    def read_and_wait(self: Watch, step: int, *rest: object) -> None:
        read(self, step, *rest)  # pyright: ignore[reportArgumentType]
        if step == last:
            (folder / f"held-{jax.process_index()}").touch()
            wait_for((folder / "released").exists)

    Watch.read = read_and_wait  # pyright: ignore[reportAttributeAccessIssue]


def compile_together(folder: pathlib.Path) -> None:
    """Lets no process begin its first step before all have compiled it: CPUs wait 30 s at most."""
    make = fit.jit_train_step

    def make_and_wait(*arguments: Any) -> Any:
        step, compiled = make(*arguments), []

        def call(state: Any, batch: Any) -> Any:
            if not compiled:
                compiled.append(step.lower(state, batch).compile())
                (folder / f"compiled-{jax.process_index()}").touch()
                wait_for(lambda: len(list(folder.glob("compiled-*"))) == jax.process_count())
            return compiled[0](state, batch)

        return call

    fit.jit_train_step = make_and_wait


def write_parts(state: Any, path: pathlib.Path) -> None:
    """This process's parts of all arrays, each under the array's path and the bounds of the part."""
    parts = {}
    for name, array in jax.tree_util.tree_leaves_with_path(state):
        for shard in array.addressable_shards:
            bounds = [index.indices(size)[:2] for index, size in zip(shard.index, array.shape, strict=True)]
            parts[f"{jax.tree_util.keystr(name)} {bounds}"] = np.asarray(shard.data)
    np.savez(path, **parts)


def tell(folder: pathlib.Path) -> None:
    """Writes what the run goes on from, and what it ends with."""
    begin, whole = fit.begin, fit.fit

    def begin_and_tell(*arguments: Any) -> Any:
        found = begin(*arguments)
        write_parts(found[0], folder / f"begin-{jax.process_index()}.npz")
        return found

    def fit_and_tell(*arguments: Any) -> Any:
        outcome = whole(*arguments)
        write_parts(outcome.state, folder / f"end-{jax.process_index()}.npz")
        return outcome

    fit.begin = begin_and_tell
    train.fit = fit_and_tell


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("documents", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path, help="where it tells")
    parser.add_argument("--hold-at-step", type=int)
    parser.add_argument("--heartbeat", type=int, help="seconds without one after which a process counts as dead")
    args, options = parser.parse_known_args()
    tell(args.folder)
    compile_together(args.folder)
    if args.hold_at_step:
        hold_at_step(args.hold_at_step, args.folder)
    if args.heartbeat:
        join = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=args.heartbeat)
        jax.distributed.initialize = join
    PRESETS[NAME] = hosts_config(args.documents)
    sys.argv = ["train.py", NAME, *MESH, *options]
    cli.run(train.main)


if __name__ == "__main__":
    main()
