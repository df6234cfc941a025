"""Imports a pretrained decoder: `lm2 import SOURCE --workdir W`.

SOURCE is a Hugging Face folder (config.json and safetensors), a .gguf file, a llama2.c .bin file, or a name owner/model
on the Hugging Face hub. The workdir holds step 0 of a run: train.py resumes it, eval.py evaluates it.
"""

import dataclasses
import pathlib
import time
from typing import Annotated, Literal

import jax

from lm2_jax import cli
from lm2_jax.commands.dataclass_options import First, parse
from lm2_jax.config import RunConfig
from lm2_jax.errors import UserError
from lm2_jax.interop.open_source import open_source
from lm2_jax.interop.workdir import Imported, import_source
from lm2_jax.presets import PRESETS, preset
from lm2_jax.sharding import Layout, MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line sets."""

    source: Annotated[str, First()]
    """Folder, file, or name on the hub."""
    workdir: str
    """New folder for the run."""
    memory: str | None = None
    """Preset whose memory and join are added to the decoder; None: no memory."""
    layers: tuple[int, ...] | None = None
    """Blocks that get the memory, from 0; None: as in the preset."""
    run: str | None = None
    """Preset that gives data, loss, optimizer and training; None: that of --memory, or the defaults."""
    segment_tokens: int | None = None
    """Tokens of a segment, within which the decoder attends; None: 512, or fewer if the model was trained for fewer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of parameters and computation."""
    tokenizer: str | None = None
    """tokenizer.json or tokenizer.model in place of the checkpoint's own."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis of the mesh on which arrays are placed while they are read and written."""


def main() -> None:
    """Parses the command line and imports."""
    command = parse(Command, cli.program("import"), __doc__ or "")
    memory = None if command.memory is None else _preset(command.memory, "--memory")
    base = _preset(command.run, "--run") if command.run else memory or RunConfig()
    source, begun = open_source(command.source), time.monotonic()
    imported = import_source(
        source,
        command.workdir,
        Layout(make_mesh(command.mesh)),
        base,
        memory,
        command.layers,
        command.segment_tokens,
        command.dtype,
        None if command.tokenizer is None else pathlib.Path(command.tokenizer),
    )
    print(report(imported, command.workdir, time.monotonic() - begun))


def report(imported: Imported, workdir: str, seconds: float) -> str:
    """What was written, and what to do with it, in a few lines."""
    model, start = imported.config.model, imported.start
    d = model.decoder
    lines = [
        f"{imported.origin['source']}: {d.num_layers} blocks of width {d.width}, vocabulary {model.vocab_size:,}, in "
        f"{seconds:.0f} s on {jax.device_count()} {jax.devices()[0].device_kind} devices"
    ]
    if imported.origin["memory"] is not None:
        changed = f"the first logits change: {start.reason}" if start.reason else "trained with the decoder"
        silent = "the first logits are the decoder's" if start.is_silent else changed
        lines.append(f"memory {model.memory.kind!r} with join {model.join.kind!r}: {silent}")
    train = f"{cli.program('train')} --config {workdir}/config.json"
    if imported.refusal:
        lines.append(f"It cannot be trained on the data of this config: {imported.refusal}")
    else:
        lines.append(f"train:    {train} --workdir {workdir}")
    lines.append(f"on your own text: {train} --text PATH --workdir NEW --init.from {workdir}")
    lines.append(f"evaluate: {cli.program('eval')} SUITE --workdir {workdir}")
    return "\n".join(lines)


def _preset(name: str, option: str) -> RunConfig:
    if name not in PRESETS:
        try:
            preset(name)
        except KeyError as error:
            raise UserError(f"{option}: {error.args[0]}") from error
    return PRESETS[name]
