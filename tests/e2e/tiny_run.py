"""A tiny run that carries its memory from step to step; as a program it can kill itself at a given moment.

python tests/e2e/tiny_run.py WORKDIR DOCUMENTS [--model {lm2,titans}] [--die-at-step N | --die-while-saving N]
    [--zero-memory] [--overwrite] [--out FILE]
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in train.py: until the work begins, Ctrl-C just ends the process

import argparse
import dataclasses
import os
import pathlib
import sys
import threading
import time

import jax
import numpy as np

import lm2_jax
from lm2_jax import cli
from lm2_jax.checkpoint import Checkpoints, Restored
from lm2_jax.config import CheckpointConfig, DataConfig, LossConfig, OptimConfig, RunConfig, TrainConfig
from lm2_jax.data.text_source import TextFiles
from lm2_jax.data.tokenizers import TokenizerConfig
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.training.fit import FitResult, fit
from lm2_jax.training.watch import Watch

STEPS, SAVE_EVERY = 20, 4
ROWS = 4
MODELS = {"lm2": lm2_jax.preset("lm2_tiny"), "titans": lm2_jax.preset("titans_mac_tiny")}


def write_documents(folder: pathlib.Path) -> pathlib.Path:
    """Long documents of made-up words, one for each row and one held out."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefgh"), 4)) for _ in range(50)]
    for index in range(ROWS + 2):
        (folder / f"{index}.txt").write_text(" ".join(draw.choice(words, 3000)))
    return folder


def tiny_config(documents: pathlib.Path, model: str = "lm2", **checkpoint: object) -> RunConfig:
    """Rows go on from step to step, so what step n learns from depends on the memory that step n - 1 left."""
    return dataclasses.replace(
        MODELS[model],
        data=DataConfig(
            source=TextFiles(path=str(documents), packing="ordered"),
            tokenizer=TokenizerConfig(kind="bytes"),
            rows=ROWS,
            segments=(2,),
            carry_state=True,
            prefetch=2,
        ),
        loss=LossConfig(text_weight=1.0),
        optim=OptimConfig(steps=STEPS, warmup_steps=2, accumulate=2),
        train=TrainConfig(log_every=1, eval_every=0, eval_batches=1),
        checkpoint=dataclasses.replace(CheckpointConfig(every_steps=SAVE_EVERY, keep=2), **checkpoint),
    )


def train(config: RunConfig, workdir: pathlib.Path, overwrite: bool = False) -> FitResult:
    """`fit` on one device."""
    return fit(config, workdir, Layout(make_mesh(MeshConfig(), jax.devices()[:1])), overwrite=overwrite)


def arrays(outcome: FitResult) -> dict[str, np.ndarray]:
    """Every array of the train state by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(outcome.state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def die() -> None:
    """As hard as a machine that loses its power."""
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_step(last: int) -> None:
    """Kills the process once the report of a step has been read."""
    read = Watch.read

    def read_and_die(self: Watch, step: int, *rest: object) -> None:
        read(self, step, *rest)  # pyright: ignore[reportArgumentType]
        if step == last:
            die()

    Watch.read = read_and_die  # pyright: ignore[reportAttributeAccessIssue]


def die_while_saving(step: int, folder: pathlib.Path) -> None:
    """Kills the process as soon as the unfinished folder of a checkpoint appears."""

    def wait() -> None:
        while not list(folder.glob(f"{step}.orbax-checkpoint-tmp*")):
            time.sleep(0.001)
        die()

    threading.Thread(target=wait, daemon=True).start()


def zero_memory() -> None:
    """Makes a restored run forget what its rows have read."""
    restore = Checkpoints.restore

    def forget(self: Checkpoints, *args: object) -> Restored | None:
        restored = restore(self, *args)  # pyright: ignore[reportArgumentType]
        assert restored is not None
        memory = jax.tree.map(lambda x: x * 0 if x.dtype != bool else x, restored.state.memory)
        return restored._replace(state=restored.state._replace(memory=memory))

    Checkpoints.restore = forget  # pyright: ignore[reportAttributeAccessIssue]


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("documents", type=pathlib.Path)
    parser.add_argument("--model", choices=MODELS, default="lm2")
    parser.add_argument("--die-at-step", type=int)
    parser.add_argument("--die-while-saving", type=int)
    parser.add_argument("--zero-memory", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.die_at_step:
        die_at_step(args.die_at_step)
    if args.die_while_saving:
        die_while_saving(args.die_while_saving, args.workdir / "checkpoints")
    if args.zero_memory:
        zero_memory()
    outcome = train(tiny_config(args.documents, args.model), args.workdir, args.overwrite)
    if args.out:
        np.savez(args.out, **arrays(outcome))
    sys.exit(outcome.status)


if __name__ == "__main__":
    cli.run(main)
