"""Exports a run: `python -m lm2_jax.interop.export_hf --workdir W --out DIR`.

A decoder without memory becomes a folder that transformers loads. A model with memory becomes safetensors with
canonical names, a config.json and a model card. `lm2_jax.from_pretrained(DIR)` reads both.
"""

import dataclasses

from lm2_jax import cli
from lm2_jax.commands.dataclass_options import parse
from lm2_jax.errors import UserError
from lm2_jax.interop.export import SHARD_BYTES, export_workdir


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line sets."""

    workdir: str
    """Workdir of the run."""
    out: str
    """New folder."""
    shard_bytes: int = SHARD_BYTES
    """Most bytes of tensors in one file of a Hugging Face model."""


def main() -> None:
    """Parses the command line and exports."""
    command = parse(Command, cli.program("export"), __doc__ or "")
    if command.shard_bytes < 1:
        raise UserError(f"--shard-bytes {command.shard_bytes}: expected a positive number")
    print(export_workdir(command.workdir, command.out, command.shard_bytes))


if __name__ == "__main__":
    cli.run(main)
