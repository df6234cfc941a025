"""The cost of streaming: one token compared with a full segment, compiled programs, and memory by text length.

    python -m benchmarks.streaming                  # lm2_tiny with segments of 512 tokens
    python -m benchmarks.streaming --preset rmt_tiny --segment-tokens 256

Writes benchmarks/results/streaming.json. Times are medians of alternating runs on this machine; their ratio matters.
Memory is measured while `eval.py`'s answerer reads a text: the peak of live arrays in bytes (device memory), and the
peak that is added to the resident memory of a separate process, which holds the text too and, on a CPU, the device's
work space.
"""

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tyro

import lm2_jax
from benchmarks import origin, resident
from lm2_jax import cli, streaming
from lm2_jax.errors import UserError
from lm2_jax.evaluation.answerer import Prompt, RunAnswerer
from lm2_jax.runs import Run

ROWS = 4  # prompts of a batch


@dataclasses.dataclass(frozen=True)
class Command:
    """Options."""

    preset: str = "lm2_tiny"
    """Preset of the model; segment length and width are replaced."""
    segment_tokens: int = 512
    """Tokens T of one segment."""
    width: int = 256
    """Model width."""
    lengths: tuple[int, ...] = (4_096, 65_536)
    """Text lengths in tokens whose peak memory is compared."""
    runs: int = 5
    """Alternating runs per measurement."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/streaming.json")
    """File to write."""
    only: int | None = None
    """Measures the peak of one length in this process; used by the benchmark itself."""


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call, until its arrays are computed."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


class Characters:
    """A tokenizer with a token per character; no answer ends early."""

    pad_id, eos_id, answer_id = 0, -1, None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """A token a character."""
        return [ord(character) % self.vocab_size for character in text]

    def decode(self, ids: list[int]) -> str:
        """The tokens, as numbers."""
        return " ".join(map(str, ids))


def answer(model: Any, params: Any, tokens: int) -> int:
    """Answers after a text of so many tokens, as `eval.py` does; returns the peak of live arrays in bytes."""
    vocab_size, most = model.config.vocab_size, 0
    read = streaming.read_segment

    def measured(*given: Any) -> Any:
        nonlocal most
        result = jax.block_until_ready(read(*given))
        most = max(most, sum(array.nbytes for array in jax.live_arrays()))
        return result

    tokenizer: Any = Characters(vocab_size)
    texts = np.random.default_rng(0).integers(0, vocab_size, (ROWS, tokens))
    prompts = [Prompt(tokenizer, "".join(map(chr, row.tolist()))) for row in texts]
    run = Run(dataclasses.replace(lm2_jax.preset("lm2_tiny"), model=model.config), model, params, tokenizer, 0)
    with unittest.mock.patch.object(streaming, "read_segment", measured):
        list(RunAnswerer(run).answers(prompts, max_new_tokens=4, rows=ROWS))
    return most


def measure_one(command: Command, tokens: int) -> None:
    """In a separate process: prints the memory that one length of text takes."""
    model, params = build(command)
    answer(model, params, min(command.lengths))  # compiles all programs
    most = 0

    def call() -> None:
        nonlocal most
        most = answer(model, params, tokens)

    print(json.dumps({"resident_bytes": resident.peak(call), "device_bytes": most}))


def peaks(command: Command, tokens: int) -> dict[str, int]:
    """The memory that one length of text takes, measured in a separate process."""
    line = [sys.executable, "-m", "benchmarks.streaming", *sys.argv[1:], "--only", str(tokens)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(line)} failed: {done.stderr[-2000:]}", status=1)
    return json.loads(done.stdout.splitlines()[-1])


def build(command: Command) -> tuple[Any, Any]:
    """The model and initial parameters."""
    config = lm2_jax.preset(command.preset).model
    decoder = dataclasses.replace(config.decoder, width=command.width, mlp_width=3 * command.width)
    model = lm2_jax.build_model(dataclasses.replace(config, segment_tokens=command.segment_tokens, decoder=decoder))
    tokens = np.zeros((1, command.segment_tokens), np.int32)
    return model, jax.jit(model.init)(jax.random.key(0), tokens, model.init_state(1))["params"]


def main() -> None:
    """Measures and writes the file."""
    command = tyro.cli(Command, description=__doc__)
    if command.only is not None:
        return measure_one(command, command.only)
    (model, params), T = build(command), command.segment_tokens
    text_BS = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, T), np.int32)
    border = model.init_state(1)
    half = streaming.absorb(model, params, text_BS[:, : T // 2], border)[1]
    segment = lambda: streaming.absorb(model, params, text_BS, border)  # noqa: E731 (two calls of one kind)
    token = lambda: streaming.absorb(model, params, text_BS[:, :1], half)  # noqa: E731
    for call in (segment, token):
        call()
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **tags: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    times = [(seconds(segment), seconds(token)) for _ in range(command.runs)]
    full, one = (statistics.median(column) for column in zip(*times, strict=True))
    programs = len(compiled)
    taken = {length: peaks(command, length) for length in command.lengths}
    longest, shortest = taken[max(taken)], taken[min(taken)]
    figures = {
        "command": origin.typed("benchmarks.streaming"),
        "machine": f"{origin.cores()}, {jax.devices()[0].device_kind}",
        "segment_seconds": full,
        "token_seconds": one,
        "token_over_segment": one / full,
        "programs_compiled_after_warm_up": programs,
        "evaluation": taken,
        "longest_over_shortest": {key: longest[key] / shortest[key] for key in longest},
    }
    command.out.parent.mkdir(parents=True, exist_ok=True)
    command.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    cli.run(main)
