"""Training on a CPU where the C library keeps freed memory, compared with its defaults.

    python -m benchmarks.allocator
    python -m benchmarks.allocator --presets lm2_tiny --remat none --pairs 1

By default glibc returns large blocks to the operating system when they are freed, and jax's CPU backend takes and frees
its work space at every step: the kernel then clears each page again. `SETTINGS` are environment variables that keep the
memory in the process. Each preset is trained by `benchmarks.training` in processes of their own that alternate between
both; the ratio of the medians is reported. Linux with glibc only. Writes benchmarks/results/allocator.json.
"""

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from typing import Literal

import tyro

from benchmarks import origin
from lm2_jax import cli
from lm2_jax.errors import UserError

SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}


@dataclasses.dataclass(frozen=True)
class Command:
    """Options."""

    presets: tuple[str, ...] = ("quickstart", "probe_rmt", "probe_block", "probe_mac")
    """Presets that are trained."""
    remat: Literal["preset", "none", "full"] = "preset"
    """What a step saves for its backward pass; preset: as the preset says."""
    pairs: int = 3
    """Processes with each setting."""
    steps: int = 20
    """Steps of a block of `benchmarks.training`."""
    blocks: int = 3
    """Blocks of a process."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/allocator.json")
    """File to write."""


def tokens_per_second(preset: str, command: Command, settings: dict[str, str]) -> float:
    """Of the complete training loop, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "training.json"
        words = [sys.executable, "-m", "benchmarks.training", "--preset", preset, "--remat", command.remat]
        words += ["--steps", str(command.steps), "--blocks", str(command.blocks), "--out", str(file)]
        plain = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=plain | settings)
        if done.returncode:
            raise UserError(f"{' '.join(words)} failed: {done.stderr[-2000:]}", status=1)
        return json.loads(file.read_text())["tokens_per_second"]


def main() -> None:
    """Measures and writes the file."""
    command = tyro.cli(Command, description=__doc__)
    if platform.libc_ver()[0] != "glibc":
        raise UserError("benchmarks.allocator measures settings of glibc, which this system does not use")
    rows = []
    for preset in command.presets:
        pairs = [
            (tokens_per_second(preset, command, {}), tokens_per_second(preset, command, SETTINGS))
            for _ in range(command.pairs)
        ]
        default, kept = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append({"preset": preset, "default": default, "kept": kept, "kept_over_default": kept / default})
        print(json.dumps(rows[-1]), flush=True)
    figures = {
        "command": origin.typed("benchmarks.allocator"),
        "machine": origin.cores(),
        "settings": SETTINGS,
        "tokens_per_second": rows,
    }
    command.out.parent.mkdir(parents=True, exist_ok=True)
    command.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
