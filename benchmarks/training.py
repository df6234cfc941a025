"""The time of a training step: tokens per second of the complete loop, and the shares of data, step and host.

    python -m benchmarks.training                    # the quickstart's model
    python -m benchmarks.training --preset probe_rmt

Three loops are measured, each with more work than the one before. Step: the compiled step on one batch that stays on
the device. Host: the batch is sent to the device at each step, and the report of the previous step is read. Data: the
loop of `train.py`, where threads prepare each batch in advance; it costs what the threads take from the cores of the
step, and what cannot be overlapped. The time that one thread needs to make a batch is reported separately. Numbers are
medians of alternating blocks of steps in one process, without evaluation and checkpoints.
"""

import dataclasses
import itertools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import tyro
from etils import epath

import lm2_jax
from benchmarks import origin
from lm2_jax import cli
from lm2_jax.config import RunConfig
from lm2_jax.data.pipeline import read_row, stack
from lm2_jax.sharding import Layout, MeshConfig, make_mesh
from lm2_jax.training.evaluate import host_batches
from lm2_jax.training.fit import prepare, prepare_jax
from lm2_jax.training.step import jit_train_step


@dataclasses.dataclass(frozen=True)
class Command:
    """Options."""

    preset: str = "quickstart"
    """Preset of the run."""
    remat: Literal["preset", "none", "full"] = "preset"
    """What a step saves for its backward pass; preset: as the preset says."""
    steps: int = 20
    """Steps per block."""
    blocks: int = 5
    """Alternating blocks per loop."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/training.json")
    """File to write."""


class Blocks:
    """Blocks of steps of one run; used inside the context of the layout."""

    def __init__(self, config: RunConfig, workdir: epath.Path):
        self.config = config
        self.layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
        prepared = prepare(config, workdir, self.layout)
        self.plan, self.source = prepared.plan, prepared.source
        self.train_step = jit_train_step(self.plan, self.layout)
        self.data: Iterator[Any] = host_batches(self.plan, self.source, self.layout)

    def warm_up(self) -> None:
        """Compiles the step."""
        self.state = self.plan.init(self.layout)
        self.batch_on_host = next(self.data)
        self.batch = self.layout.batch(self.batch_on_host)
        self.step(1)

    def read(self, steps: int) -> None:
        """Makes batches in one thread."""
        data = self.config.data
        for step in range(steps):
            stack([read_row(data, self.source, step, row, False) for row in range(data.rows)])

    def step(self, steps: int) -> None:
        """The compiled step alone."""
        for _ in range(steps):
            self.state, _ = self.train_step(self.state, self.batch)
        jax.block_until_ready(self.state)

    def host(self, steps: int) -> None:
        """As `fit`, with the same batch at each step."""
        self._loop(itertools.repeat(self.batch_on_host), steps)

    def loop(self, steps: int) -> None:
        """As `fit`, with a new batch from the threads at each step."""
        self._loop(self.data, steps)

    def _loop(self, data: Iterator[Any], steps: int) -> None:
        pending = None
        for _ in range(steps):
            self.state, report = self.train_step(self.state, self.layout.batch(next(data)))
            if pending is not None:
                jax.device_get(pending)
            pending = report
        jax.block_until_ready(self.state)


def seconds(call: Any, steps: int) -> float:
    """Wall time per step."""
    began = time.perf_counter()
    call(steps)
    return (time.perf_counter() - began) / steps


def main() -> None:
    """Measures and writes the file."""
    command = tyro.cli(Command, description=__doc__)
    config = lm2_jax.preset(command.preset)
    if command.remat != "preset":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=command.remat))
    prepare_jax(config)
    with tempfile.TemporaryDirectory() as folder:
        blocks = Blocks(config, epath.Path(folder))
        with blocks.layout.context():
            blocks.warm_up()
            times = [
                [seconds(call, command.steps) for call in (blocks.read, blocks.step, blocks.host, blocks.loop)]
                for _ in range(command.blocks)
            ]
    read, step, host, loop = (statistics.median(column) for column in zip(*times, strict=True))
    figures = {
        "command": origin.typed("benchmarks.training"),
        "machine": f"{origin.cores()}, {jax.devices()[0].device_kind}",
        "tokens_per_second": blocks.batch.tokens.size / loop,
        "seconds_of_a_step": loop,
        "share_of_step": step / loop,
        "share_of_host": (host - step) / loop,
        "share_of_data": (loop - host) / loop,
        "batch_by_one_thread_over_step": read / step,
    }
    command.out.parent.mkdir(parents=True, exist_ok=True)
    command.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    cli.run(main)
