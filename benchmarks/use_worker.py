"""One side of benchmarks.use: a process that reads and decodes when it is asked to, and says how long that took.

Nothing of lm2_jax is imported here, so that the process of transformers runs in an environment of its own.
"""

import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

CHUNK = 512  # tokens given to one call


def resident_bytes() -> int:
    """Resident memory of this process."""
    return os.sysconf("SC_PAGE_SIZE") * int(pathlib.Path("/proc/self/statm").read_text().split()[1])


class Peak:
    """The largest resident memory within a `with` block, sampled every 5 milliseconds."""

    def __enter__(self) -> "Peak":
        self.bytes, self._done = resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, resident_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


class Reading(NamedTuple):
    """What a side can do; every function waits for its results."""

    start: Callable[[], Any]  # the state before any token
    extend: Callable[[Any, list[int]], Any]  # the state after a chunk of tokens
    decode: Callable[[Any], Any]  # the state after one token
    filled: Callable[[int], Any]  # a state of the size that it has after so many tokens, which are not read
    vocab_size: int


def serve(side: Reading, first_logits: list[float]) -> None:
    """Answers requests `{"length": tokens, "decode": tokens, "filled": bool}`, one per line, until standard input ends.

    With `filled`, the text is not read; what is measured is the next chunk after a state of that length.

    Args:
      side: what is measured.
      first_logits: some logits, by which both sides are compared.
    """
    side.decode(_read(side, side.start(), CHUNK))  # warm-up: compiles what has to be compiled
    print(json.dumps({"ready": resident_bytes(), "logits": first_logits}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        is_filled = wanted["filled"]
        with Peak() as peak:
            state = side.filled(wanted["length"]) if is_filled else side.start()
            began = time.perf_counter()
            state = _read(side, state, CHUNK if is_filled else wanted["length"])
            read_seconds = time.perf_counter() - began
            times = []
            for _ in range(wanted["decode"]):
                began = time.perf_counter()
                state = side.decode(state)
                times.append(time.perf_counter() - began)
        del state
        answer = {"read_seconds": read_seconds, "decode_seconds": sorted(times)[len(times) // 2]}
        print(json.dumps(answer | {"peak_bytes": peak.bytes}), flush=True)


def _read(side: Reading, state: Any, length: int) -> Any:
    tokens = text(length, side.vocab_size)
    for first in range(0, length, CHUNK):
        state = side.extend(state, tokens[first : first + CHUNK])
    return state


def text(length: int, vocab_size: int) -> list[int]:
    """Tokens that both sides read."""
    return [(7919 * i * i + 104729 * i) % vocab_size for i in range(length)]


def peer(folder: str) -> None:
    """transformers, reading a folder of weights."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config

    @torch.inference_mode()
    def extend(cache: Any, tokens: list[int]) -> Any:
        return model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def filled(length: int) -> Any:
        cache, width = DynamicCache(), config.hidden_size // config.num_attention_heads
        for layer in range(config.num_hidden_layers):
            kv = torch.randn(2, 1, config.num_key_value_heads, length, width)
            cache.update(kv[0], kv[1], layer)
        return cache

    with torch.inference_mode():
        logits = model(torch.tensor([text(32, config.vocab_size)])).logits[0, -1, :64].tolist()
    side = Reading(DynamicCache, extend, lambda cache: extend(cache, [1]), filled, config.vocab_size)
    serve(side, logits)


if __name__ == "__main__":
    peer(sys.argv[1])
