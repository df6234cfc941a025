"""What methods cost: parameters, state, floating-point operations and milliseconds per token, measured in turns.

    python -m benchmarks.method_costs                             # the probe's methods of docs/experiments.md
    python -m benchmarks.method_costs --presets lm2_tiny rmt_tiny --out runs/costs

Training is the compiled step on one batch that stays on the device. Reading is one row of as many segments as a row of
training has, from an initial state. Generating is one segment of single tokens of one row, after such a text. Times are
medians of alternating blocks in one process, so methods can be compared with each other; they depend on the machine.
Operations are those of matrix products, without recomputation in the backward pass (6 N per token and attention; and
what the memory does). Writes benchmarks/results/method_costs.json and .md.
"""

import dataclasses
import json
import pathlib
import statistics
import tempfile
from typing import Any

import jax
import numpy as np
import tyro
from etils import epath

import lm2_jax
from benchmarks import origin
from benchmarks.training import Blocks, seconds
from lm2_jax import cli, streaming
from lm2_jax.config import RunConfig
from lm2_jax.evaluation.names import model_name
from lm2_jax.model import LanguageModel
from lm2_jax.state import state_floats
from lm2_jax.training.fit import prepare_jax
from lm2_jax.training.flops import traced_flops
from lm2_jax.training.objective import batch_shapes
from lm2_jax.training.state import make_plan
from lm2_jax.training.step import make_train_step

PROBE = (
    *("probe_none", "probe_window", "probe_full", "probe_block_half", "probe_block", "probe_block_threaded"),
    *("probe_content", "probe_paper", "probe_mac", "probe_rmt", "probe_rmt_16", "probe_armt", "probe_infini"),
    *("probe_gated_delta", "probe_hmt"),
)
COLUMNS = {
    "training_flops": "FLOPs per token, training",
    "reading_flops": "reading",
    "training_ms": "ms per token, training",
    "reading_ms": "reading",
    "generating_ms": "generating",
}


@dataclasses.dataclass(frozen=True)
class Command:
    """Options."""

    presets: tuple[str, ...] = PROBE
    """Methods."""
    steps: int = 5
    """Training steps of a block."""
    texts: int = 3
    """Texts of a block that are read, each followed by a segment of generated tokens."""
    blocks: int = 5
    """Alternating blocks of each method."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/method_costs")
    """Table to write, as .json and .md."""


class Method:
    """One preset; used inside the context of its layout."""

    def __init__(self, config: RunConfig, workdir: epath.Path):
        self.config, self.blocks = config, Blocks(config, workdir)
        self.model = self.blocks.plan.model
        self.tokens = max(config.data.segments) * config.model.segment_tokens
        self.text_BS = np.random.default_rng(0).integers(0, config.model.vocab_size, (1, self.tokens), np.int32)
        self.times: list[tuple[float, float, float]] = []

    def warm_up(self) -> None:
        """Compiles everything."""
        with self.blocks.layout.context():
            self.blocks.warm_up()
            self.generate(1)

    def measure(self, command: Command) -> None:
        """One block; seconds per token."""
        with self.blocks.layout.context():
            step = seconds(self.blocks.step, command.steps)
            read = seconds(self.read, command.texts)
            both = seconds(self.generate, command.texts)
        of_batch, of_segment = self.blocks.batch.tokens.size, self.config.model.segment_tokens
        self.times.append((step / of_batch, read / self.tokens, (both - read) / of_segment))

    def read(self, texts: int) -> Any:
        """Texts from an initial state; returns the last stream."""
        for _ in range(texts):
            logits, stream = streaming.absorb(self.model, self.params, self.text_BS, self.model.init_state(1))
        return jax.block_until_ready((logits, stream))[1]

    def generate(self, texts: int) -> None:
        """The same, and after each text a segment of single tokens."""
        for _ in range(texts):
            stream = self.read(1)
            for token in range(self.config.model.segment_tokens):
                token_B1 = self.text_BS[:, token : token + 1]
                logits, stream = streaming.absorb(self.model, self.params, token_B1, stream)
                jax.block_until_ready(logits)

    @property
    def params(self) -> Any:
        """The current parameters; each training step takes over the arrays of the one before."""
        return self.blocks.state.params

    def row(self) -> dict[str, Any]:
        """A row of the table."""
        train, read, generate = (1000 * statistics.median(column) for column in zip(*self.times, strict=True))
        return {
            "preset": self.config.name,
            "model": model_name(self.config.model),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.blocks.plan.shapes.params)),
            "state_floats": state_floats(jax.eval_shape(lambda: self.model.init_state(1))),
            **flops(self.config),
            "training_ms": train,
            "reading_ms": read,
            "generating_ms": generate,
        }


def flops(config: RunConfig) -> dict[str, float]:
    """Matrix operations per token, of a training step without recomputation and of reading the same rows."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    plan = make_plan(config, LanguageModel(config.model))
    rows, segments, of_segment = config.data.rows, max(config.data.segments), config.model.segment_tokens
    batch = batch_shapes(rows, segments, of_segment)
    step = traced_flops(make_train_step(plan), plan.shapes, batch)

    def read(params: Any, tokens_BS: Any) -> Any:
        return plan.step_model.apply({"params": params}, tokens_BS, plan.step_model.init_state(rows))

    tokens = rows * segments * of_segment
    shapes = jax.ShapeDtypeStruct((rows, segments * of_segment), np.int32)
    return {"training_flops": step / tokens, "reading_flops": traced_flops(read, plan.shapes.params, shapes) / tokens}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| model | preset | parameters | floats of state | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("|---" * (4 + len(COLUMNS)) + "|")
    for row in rows:
        cells = [row["model"], row["preset"], f"{row['parameters']:,}", f"{row['state_floats']:,}"]
        cells += [f"{row[name]:,.0f}" if name.endswith("flops") else f"{row[name]:.3g}" for name in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the table."""
    command = tyro.cli(Command, description=__doc__)
    methods = []
    with tempfile.TemporaryDirectory() as folder:
        for preset in command.presets:
            config = lm2_jax.preset(preset)
            prepare_jax(config)
            methods.append(Method(config, epath.Path(folder) / preset))
            methods[-1].warm_up()
            print(f"compiled {preset}", flush=True)
        for _ in range(command.blocks):
            for method in methods:
                method.measure(command)
    rows = [method.row() for method in methods]
    where = f"{origin.cores()}, {jax.devices()[0].device_kind}"
    typed = origin.typed("benchmarks.method_costs")
    command.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"command": typed, "machine": where, "rows": rows}
    command.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    text = table(rows) + "\n" + origin.markdown([(typed, where)])
    command.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    cli.run(main)
