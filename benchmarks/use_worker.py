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
from typing import Any

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


def serve(read: Callable[[int], Any], decode: Callable[[Any], Any], first_logits: list[float]) -> None:
    """Answers requests `{"length": tokens, "decode": tokens}`, one per line, until standard input ends.

    Args:
      read: reads so many tokens and returns the state after them.
      decode: decodes one token and returns the next state; must wait for its result.
      first_logits: some logits, by which both sides are compared.
    """
    decode(read(CHUNK))  # warm-up: compiles what has to be compiled
    print(json.dumps({"ready": resident_bytes(), "logits": first_logits}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        with Peak() as peak:
            began = time.perf_counter()
            state = read(wanted["length"])
            read_seconds = time.perf_counter() - began
            times = []
            for _ in range(wanted["decode"]):
                began = time.perf_counter()
                state = decode(state)
                times.append(time.perf_counter() - began)
        del state
        answer = {"read_seconds": read_seconds, "decode_seconds": sorted(times)[len(times) // 2]}
        print(json.dumps(answer | {"peak_bytes": peak.bytes}), flush=True)


def text(length: int, vocab_size: int) -> list[int]:
    """Tokens that both sides read."""
    return [(7919 * i * i + 104729 * i) % vocab_size for i in range(length)]


def peer(folder: str) -> None:
    """transformers, reading a folder of weights."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    size = model.config.vocab_size

    @torch.inference_mode()
    def read(length: int) -> Any:
        tokens, cache = text(length, size), DynamicCache()
        for first in range(0, length, CHUNK):
            ids = torch.tensor([tokens[first : first + CHUNK]])
            cache = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        return cache

    @torch.inference_mode()
    def decode(cache: Any) -> Any:
        return model(torch.tensor([[1]]), past_key_values=cache, use_cache=True).past_key_values

    with torch.inference_mode():
        logits = model(torch.tensor([text(32, size)])).logits[0, -1, :64].tolist()
    serve(read, decode, logits)


if __name__ == "__main__":
    peer(sys.argv[1])
