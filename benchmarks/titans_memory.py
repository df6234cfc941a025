"""Compares our Titans memory with titans-pytorch: time, memory, and their growth with text and chunk length.

    pip install torch titans-pytorch
    python -m benchmarks.titans_memory                      # width 256, 4 heads, depth 2, chunks of 64
    python -m benchmarks.titans_memory --lengths 1024 --no-peer

Variants: `ours` saves for the backward pass what `TitansConfig` saves by default; `ours_chunks` saves the weights of
each chunk (remat="chunks": faster, more memory). By default titans-pytorch evaluates all inner gradients of a call at
its first weights (`peer`). With its batch_size set to the chunk it evaluates them at the start of each chunk
(`anchored`), as the paper and our code do. Both readings of the peer are reported.

Equal settings: width, heads, inner network (an MLP of the same depth, expansion 4, with a norm and a residual
connection), chunk, float32, one row, no convolutions, step size per token, momentum and forgetting per chunk. In both,
the gradient of the outer loss reaches all parameters and inputs, through the inner gradients (second order) and from
chunk to chunk without truncation; finite differences of the peer agree.

Differences: a chunk of the peer is one step. Momentum and forgetting act once per chunk, and all its tokens read the
weights after the previous chunk. Ours acts once per token, and each token reads the weights after itself: at a chunk
of 64 this takes twice as many multiplications. The scale of the peer's inner norm is trained in the inner loop, ours in
the outer one. The peer's step size is at most 1 on a mean over the width, ours 0.1 on a sum.

Runs of all variants alternate, and medians are compared. With one thread, time is the processor time of the process,
so that other processes do not count; with more threads it is wall time. Memory is the peak that one forward and
backward pass adds to a separate process.

Writes benchmarks/results/titans_memory.json and .md. Times depend on the machine; their ratio matters.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import tyro

from benchmarks import origin, resident
from lm2_jax import cli
from lm2_jax.errors import UserError

Call = Callable[[], Any]
Remat = Literal["none", "chunks", "groups"]
Side = Literal["ours", "ours_chunks", "peer", "anchored"]


class Pass(NamedTuple):
    """A forward pass, or a forward and a backward one."""

    prepare: Call  # compiles, without running it
    call: Call


Passes = dict[str, Pass]


@dataclasses.dataclass(frozen=True)
class Command:
    """Options."""

    width: int = 256
    """Model width D."""
    num_heads: int = 4
    """Heads; each has its own memory."""
    depth: int = 2
    """Layers of the inner MLP."""
    chunk_tokens: int = 64
    """Tokens of a chunk."""
    lengths: tuple[int, ...] = (1_024, 4_096, 16_384)
    """Tokens per call."""
    chunks: tuple[int, ...] = (16, 64, 256)
    """Chunk lengths that are compared at `chunk_length` tokens."""
    chunk_length: int = 4_096
    """Tokens per call in the comparison of chunk lengths."""
    runs: int = 5
    """Alternating runs per measurement."""
    slow_runs: int = 3
    """Runs per measurement where a run takes more than `slow_seconds`."""
    slow_seconds: float = 10.0
    """Limit for `slow_runs`."""
    peer: bool = True
    """Whether titans-pytorch is measured as well."""
    threads: int = 1
    """Threads of each library."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/titans_memory.json")
    """File to write; the table is written next to it as .md."""
    only: tuple[Literal["ours", "ours_chunks", "peer", "anchored"], Literal["forward", "backward"], int, int] | None = (
        None
    )
    """Variant, pass, length and chunk whose peak memory this process prints; used by the benchmark itself."""


def ours(command: Command, tokens: int, chunk: int, remat: Remat | None = None) -> Passes:
    """The forward pass, and forward with backward pass, of our memory."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lm2_jax.memory.titans import GateConfig, StepConfig, TitansConfig
    from lm2_jax.ops.ttt_chunk.networks import MlpNetwork
    from lm2_jax.precision import Precision

    config = TitansConfig(
        num_heads=command.num_heads,
        chunk_tokens=chunk,
        network=MlpNetwork(depth=command.depth),
        step=StepConfig(per="token"),
        momentum=GateConfig("chunk", 2.0),
        forget=GateConfig("chunk", -4.0),
        conv_tokens=0,
    )
    config = config if remat is None else dataclasses.replace(config, remat=remat)
    memory = config.build(command.width, Precision())
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, tokens, command.width), np.float32))
    state, valid = memory.init_state(1), jnp.ones((1, tokens), bool)
    params = jax.jit(memory.init)(jax.random.key(0), x[:, :chunk], state, valid[:, :chunk])

    def forward(params: Any, x: Any) -> Any:
        return memory.apply(params, x, state, valid)[0]

    def compiled(fn: Callable[..., Any]) -> Pass:
        program = functools.cache(lambda: jax.jit(fn).lower(params, x).compile())
        return Pass(program, lambda: jax.block_until_ready(program()(params, x)))

    learn = jax.grad(lambda params, x: jnp.sum(forward(params, x) ** 2), argnums=(0, 1))
    return {"forward": compiled(forward), "backward": compiled(learn)}


def ours_chunks(command: Command, tokens: int, chunk: int) -> Passes:
    """`ours`, with the weights of each chunk saved for the backward pass."""
    return ours(command, tokens, chunk, "chunks")


def anchored(command: Command, tokens: int, chunk: int) -> Passes:
    """titans-pytorch, with inner gradients at the start of each chunk."""
    return peer(command, tokens, chunk, chunk)


def peer(command: Command, tokens: int, chunk: int, batch: int | None = None) -> Passes:
    """titans-pytorch, with all inner gradients at the first weights."""
    import torch  # pyright: ignore[reportMissingImports]
    from titans_pytorch import MemoryMLP, NeuralMemory  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(command.threads)
    torch.manual_seed(0)
    head = command.width // command.num_heads
    network = MemoryMLP(head, depth=command.depth, expansion_factor=4.0)
    memory = NeuralMemory(
        dim=command.width,
        chunk_size=chunk,
        batch_size=batch,
        heads=command.num_heads,
        dim_head=head,
        model=network,
        momentum=True,
    )
    x = torch.randn(1, tokens, command.width)

    def forward() -> Any:
        with torch.no_grad():
            return memory(x)[0]

    def backward() -> None:
        memory.zero_grad()
        leaf = x.detach().requires_grad_()
        memory(leaf)[0].square().sum().backward()

    nothing = lambda: None  # noqa: E731
    return {"forward": Pass(nothing, forward), "backward": Pass(nothing, backward)}


SIDES: dict[str, Callable[[Command, int, int], Passes]] = {
    "ours": ours,
    "ours_chunks": ours_chunks,
    "peer": peer,
    "anchored": anchored,
}


def sides_of(command: Command) -> list[str]:
    """The variants that are measured."""
    return [side for side in SIDES if command.peer or side.startswith("ours")]


def seconds(command: Command, call: Call) -> float:
    """Time of one call; see the docstring of the module."""
    clock = time.process_time if command.threads == 1 else time.perf_counter
    began = clock()
    call()
    return clock() - began


def times(command: Command, tokens: int, chunk: int) -> dict[str, dict[str, float]]:
    """Medians of alternating runs after a warm-up run, by pass and variant."""
    sides = sides_of(command)
    calls = {side: SIDES[side](command, tokens, chunk) for side in sides}
    result: dict[str, dict[str, float]] = {}
    for name in ("forward", "backward"):
        for side in sides:
            calls[side][name].prepare()
        first = max(seconds(command, calls[side][name].call) for side in sides)
        runs = command.slow_runs if first > command.slow_seconds else command.runs
        taken = [[seconds(command, calls[side][name].call) for side in sides] for _ in range(runs)]
        medians = zip(sides, map(statistics.median, zip(*taken, strict=True)), strict=True)
        result[name] = {"runs": float(runs), **dict(medians)}
    return result


def peak_bytes(command: Command, side: str, name: str, tokens: int, chunk: int) -> int:
    """Peak resident memory that one pass adds to a separate process."""
    fields = ("width", "num_heads", "depth", "threads")
    options = [text for field in fields for text in (f"--{field.replace('_', '-')}", str(getattr(command, field)))]
    only = ["--only", side, name, str(tokens), str(chunk)]
    line = [sys.executable, "-m", "benchmarks.titans_memory", *options, *only]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(line)} failed: {done.stderr[-2000:]}", status=1)
    return int(done.stdout.split()[-1])


def measure_one(command: Command) -> None:
    """In a separate process: prints the bytes that one call adds to its memory."""
    assert command.only is not None
    side, name, tokens, chunk = command.only
    SIDES[side](command, chunk, chunk)[name].call()  # one-time set-up of the libraries
    prepare, call = SIDES[side](command, tokens, chunk)[name]
    prepare()
    print(resident.peak(call))


def growth(rows: list[dict[str, Any]], side: str, name: str, key: str, by: str) -> float | None:
    """Exponent of the growth from the smallest to the largest number of tokens, or chunk; 1 is linear."""
    rows = sorted((row for row in rows if side in row[key].get(name, {})), key=lambda row: row[by])
    if not rows or rows[0][by] == rows[-1][by]:
        return None
    first, last = (row[key][name][side] for row in (rows[0], rows[-1]))
    return math.log(last / first) / math.log(rows[-1][by] / rows[0][by])


def table(figures: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    rows = figures["rows"]
    sides = [side for side in SIDES if side in rows[0]["seconds"]["forward"]]
    peers = [side for side in sides if not side.startswith("ours")]
    head = ["tokens", "chunk", "pass", "runs", *(f"{side}, s" for side in sides)]
    head += [f"{side} / ours" for side in peers] + [f"{side}, MiB" for side in sides]
    lines = [f"# Titans memory\n\n`{figures['command']}` on {figures['machine']}; {figures['versions']}.\n"]
    lines += [f"Time: {figures['time']}; `backward` is a forward and a backward pass."]
    lines += ["What is compared: the docstring of `benchmarks/titans_memory.py`.\n"]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=lambda row: (row["tokens"], row["chunk"])):
        for name, taken in row["seconds"].items():
            peaks = row["peak_bytes"].get(name, {})
            cells = [str(row["tokens"]), str(row["chunk"]), name, f"{taken['runs']:.0f}"]
            cells += [f"{taken[side]:.3f}" if side in taken else "" for side in sides]
            cells += [f"{taken[side] / taken['ours']:.2f}" if side in taken else "" for side in peers]
            cells += [f"{peaks[side] / 2**20:.0f}" if side in peaks else "" for side in sides]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Growth, as an exponent (1 is linear):", ""]
    lines += [f"- {name}: {value:.2f}" for name, value in figures["growth"].items() if value is not None]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measures and writes the numbers."""
    command = tyro.cli(Command, description=__doc__)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if command.threads == 1:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    needs_peer = command.peer and (command.only is None or not command.only[0].startswith("ours"))
    if needs_peer and importlib.util.find_spec("titans_pytorch") is None:
        raise UserError("titans-pytorch is not installed: `pip install torch titans-pytorch`, or pass --no-peer")
    if command.only is not None:
        return measure_one(command)
    rows: list[dict[str, Any]] = []
    for tokens, chunk in cases(command):
        peaks = {side: peak_bytes(command, side, "backward", tokens, chunk) for side in sides_of(command)}
        taken = times(command, tokens, chunk)
        rows.append({"tokens": tokens, "chunk": chunk, "seconds": taken, "peak_bytes": {"backward": peaks}})
        write(command, rows)  # so that nothing is lost when a long text takes too long


def cases(command: Command) -> list[tuple[int, int]]:
    """Text and chunk lengths, the longest text last."""
    of_chunks = [(command.chunk_length, chunk) for chunk in command.chunks]
    of_lengths = [(tokens, command.chunk_tokens) for tokens in command.lengths]
    return sorted({*of_chunks, *of_lengths}, key=lambda case: (case[0], -case[1]))


def write(command: Command, rows: list[dict[str, Any]]) -> None:
    """Writes the numbers so far, as JSON and as Markdown."""
    by = {
        "tokens": [row for row in rows if row["chunk"] == command.chunk_tokens],
        "chunk": [row for row in rows if row["tokens"] == command.chunk_length],
    }
    figures = {
        "command": origin.typed("benchmarks.titans_memory"),
        "machine": f"{origin.machine()}, {command.threads} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "titans-pytorch")),
        "time": "processor time" if command.threads == 1 else "wall time",
        "rows": rows,
        "growth": {
            f"{key.replace('_', ' ')} of {name} with {size}, {side}": growth(by[size], side, name, key, size)
            for size in by
            for key in ("seconds", "peak_bytes")
            for name in ("forward", "backward")
            for side in sides_of(command)
        },
    }
    command.out.parent.mkdir(parents=True, exist_ok=True)
    command.out.write_text(json.dumps(figures, indent=1) + "\n")
    command.out.with_suffix(".md").write_text(table(figures))
    print(table(figures), flush=True)


def version(name: str) -> str:
    """Version of an installed package, or `none`."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    cli.run(main)
