"""Stability of the outer gradient through Titans' inner loop: its norm at the first step, for several initialisations.

    python -m benchmarks.titans_stability                         # babilong_small_mac: 64 chunks of 16 tokens a row

Each variant takes one train step on one batch. Reported are the norm of the gradient before clipping and the inner
loss (mean over layers). Without memory the norm is about 1. A norm far above that means that the inner loop is
chaotic, and the clipped gradient then has a random direction.

Writes benchmarks/results/titans_stability.json and .md.
"""

import dataclasses
import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import tyro
from etils import epath

import lm2_jax
from benchmarks import origin
from benchmarks.training import Blocks
from lm2_jax import cli
from lm2_jax.config import RunConfig
from lm2_jax.errors import UserError
from lm2_jax.memory.titans import GateConfig, StepConfig, TitansConfig
from lm2_jax.ops.ttt_chunk.networks import LinearNetwork, MlpNetwork
from lm2_jax.presets.tiny import replace_model
from lm2_jax.training.fit import prepare_jax


@dataclasses.dataclass(frozen=True)
class Command:
    """Options."""

    preset: str = "babilong_small_mac"
    """A preset with a Titans memory."""
    segments: int = 8
    """Segments per row."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/titans_stability")
    """Table to write, as .json and .md."""


def variants(base: TitansConfig) -> dict[str, TitansConfig]:
    """The default, and variants that differ from it in one option or in all."""
    replace = dataclasses.replace
    scale_free = MlpNetwork(norm_epsilon=1e-6)
    return {
        "default": base,
        "norm_epsilon=1e-6": replace(base, network=scale_free),
        "no norm": replace(base, network=MlpNetwork(norm=False)),
        "linear network": replace(base, network=LinearNetwork()),
        "step.bias=0": replace(base, step=StepConfig(bias=0.0)),
        "forget.bias=-4": replace(base, forget=GateConfig(bias=-4.0)),
        "chunks of 64": replace(base, chunk_tokens=64),
        "norm_epsilon=1e-6, step.bias=0, forget.bias=-4": replace(
            base, network=scale_free, step=StepConfig(bias=0.0), forget=GateConfig(bias=-4.0)
        ),
    }


def measure(config: RunConfig) -> dict[str, float]:
    """Gradient norm and inner loss of the first step."""
    with tempfile.TemporaryDirectory() as folder:
        blocks = Blocks(config, epath.Path(folder))
        with blocks.layout.context():
            batch = blocks.layout.batch(next(blocks.data))
            _, report = blocks.train_step(blocks.plan.init(blocks.layout), batch)
    aux: dict[str, Any] = report.aux
    inner = {name: float(np.mean(value)) for name, value in aux.items() if "inner_loss" in name}
    return {"grad_norm": float(report.grad_norm), **inner}


def main() -> None:
    """Measures and writes the table."""
    command = tyro.cli(Command, description=__doc__)
    config = lm2_jax.preset(command.preset)
    memory = config.model.memory
    if not isinstance(memory, TitansConfig):
        raise UserError(f"{command.preset} has the memory {memory.kind!r}; expected a preset with 'titans'")
    data = dataclasses.replace(config.data, segments=(command.segments,), stage_steps=())
    config = dataclasses.replace(config, data=data)
    prepare_jax(config)
    rows = {name: measure(replace_model(config, memory=variant)) for name, variant in variants(memory).items()}
    made = origin.typed("benchmarks.titans_stability"), origin.cores()
    lines = ["| variant | gradient norm | inner loss |", "|---|---|---|"]
    lines += [f"| {name} | {row['grad_norm']:.2g} | {row['inner_loss_before']:.3g} |" for name, row in rows.items()]
    text = "\n".join(lines) + "\n"
    command.out.parent.mkdir(parents=True, exist_ok=True)
    command.out.with_suffix(".md").write_text(f"{text}\n{origin.markdown([made])}")
    figures = {"command": made[0], "machine": made[1], "variants": rows}
    command.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    cli.run(main)
