"""What streaming costs: one token against a whole segment, programs compiled, and device memory by length.

    python -m benchmarks.streaming                  # lm2_tiny with segments of 512 tokens
    python -m benchmarks.streaming --preset rmt_tiny --segment-tokens 256

Writes benchmarks/results/streaming.json. Times are medians of alternating runs on this machine; what counts is their
ratio.
"""

import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tyro

import lm2_jax
from benchmarks import origin
from lm2_jax import cli, streaming


@dataclasses.dataclass(frozen=True)
class Command:
    """What is measured."""

    preset: str = "lm2_tiny"
    """Preset of the model; its segments are made longer."""
    segment_tokens: int = 512
    """Tokens T of one segment."""
    width: int = 256
    """Model width."""
    lengths: tuple[int, ...] = (4_096, 65_536)
    """Texts, in tokens, whose peak of device memory is compared."""
    runs: int = 5
    """Alternating runs of each time."""
    out: pathlib.Path = pathlib.Path("benchmarks/results/streaming.json")
    """Where the figures go."""


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call, its arrays finished."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def live_bytes() -> int:
    """Bytes of all arrays on the device."""
    return sum(array.nbytes for array in jax.live_arrays())


def peak_bytes(model: Any, params: Any, tokens_BS: np.ndarray) -> int:
    """Most bytes of live arrays while a text is absorbed segment by segment."""
    state, most, T = model.init_state(tokens_BS.shape[0]), 0, model.config.segment_tokens
    for first in range(0, tokens_BS.shape[1], T):
        logits, state = streaming.absorb(model, params, tokens_BS[:, first : first + T], state)
        jax.block_until_ready(logits)
        most = max(most, live_bytes())
    return most


def main() -> None:
    """Measures and writes the figures."""
    command = tyro.cli(Command, description=__doc__)
    config = lm2_jax.preset(command.preset).model
    decoder = dataclasses.replace(config.decoder, width=command.width, mlp_width=3 * command.width)
    config = dataclasses.replace(config, segment_tokens=command.segment_tokens, decoder=decoder)
    model, T = lm2_jax.build_model(config), command.segment_tokens
    text_BS = np.random.default_rng(0).integers(0, config.vocab_size, (1, max(command.lengths)), np.int32)
    params = jax.jit(model.init)(jax.random.key(0), text_BS[:, :T], model.init_state(1))["params"]
    border = model.init_state(1)
    half = streaming.absorb(model, params, text_BS[:, : T // 2], border)[1]
    segment = lambda: streaming.absorb(model, params, text_BS[:, :T], border)  # noqa: E731 (two calls of one kind)
    token = lambda: streaming.absorb(model, params, text_BS[:, :1], half)  # noqa: E731
    segment(), token()
    programs = streaming._advance._cache_size()
    times = [(seconds(segment), seconds(token)) for _ in range(command.runs)]
    whole, one = (statistics.median(column) for column in zip(*times, strict=True))
    peaks = {str(length): peak_bytes(model, params, text_BS[:, :length]) for length in command.lengths}
    figures = {
        "command": origin.typed("benchmarks.streaming"),
        "machine": f"{origin.cores()}, {jax.devices()[0].device_kind}",
        "segment_seconds": whole,
        "token_seconds": one,
        "token_over_segment": one / whole,
        "programs_compiled_after_warm_up": streaming._advance._cache_size() - programs,
        "peak_bytes": peaks,
        "peak_ratio": max(peaks.values()) / min(peaks.values()),
    }
    command.out.parent.mkdir(parents=True, exist_ok=True)
    command.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    cli.run(main)
