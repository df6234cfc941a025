"""Progress of a run: a live line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Collection
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lm2_jax.chips import peak_flops
from lm2_jax.config import ModelConfig
from lm2_jax.types import PyTree


def flops_per_token(config: ModelConfig, params: PyTree) -> float:
    """Floating-point operations of training on one token: 6 N, and 6 L H K T for causal attention in a segment.

    N leaves out an embedding that is only looked up, which is one without the head tied to it. What a memory does
    beyond its parameters is not counted, nor is recomputation.
    """
    decoder = config.decoder
    sizes = jax.tree.map(lambda p: float(np.prod(p.shape)), params)
    looked_up = 0.0 if decoder.tie_head else config.vocab_size * decoder.width
    attention = decoder.num_layers * decoder.num_heads * decoder.head_dim * config.segment_tokens
    return 6.0 * (sum(jax.tree.leaves(sizes)) - looked_up + attention)


class Throughput:
    """Tokens per second since the last call, model FLOPs utilisation (MFU), and the time left.

    Args:
      flops: of one token.
      steps: of the run.
      devices: that share the work.
    """

    def __init__(self, flops: float, steps: int, devices: Collection[Any]):
        self._flops, self._steps = flops, steps
        self._last = time.monotonic()
        self._tokens = 0
        self._base: tuple[float, int] | None = None  # where the pace is measured from: after the compilation
        peak = peak_flops(next(iter(devices)).device_kind)
        self._peak = None if peak is None else peak * len(devices)

    def count(self, tokens: int) -> None:
        """Adds the tokens of a step."""
        self._tokens += tokens

    def leave_out(self, seconds: float) -> None:
        """Excludes seconds that were not spent on training."""
        self._last += seconds

    def measure(self, step: int) -> dict[str, float]:
        """Rates since the last call, and `seconds_left`; the first result includes the compilation, so it has none."""
        now = time.monotonic()
        rate = self._tokens / max(now - self._last, 1e-9)
        values = {"tokens_per_second": rate}
        if self._base is None:
            self._base = (now, step)
        else:
            since, first = self._base
            values["seconds_left"] = (now - since) / max(step - first, 1) * (self._steps - step)
        self._last, self._tokens = now, 0
        if self._peak is not None:
            values["mfu"] = rate * self._flops / self._peak
        return values


def summary(values: dict[str, float]) -> str:
    """The main numbers of a step, in one line."""
    parts = [f"loss {values['loss']:.3f}"] if "loss" in values else []
    if "answer_accuracy" in values:
        parts.append(f"answers {100 * values['answer_accuracy']:.1f}%")
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
        parts.append(f"MFU {100 * values['mfu']:.1f}%")
    if "seconds_left" in values:
        parts.append(f"{clock(values['seconds_left'])} left")
    return " | ".join(parts)


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressLine:
    """Shows how far a run is, on the first process only.

    Args:
      steps: of the run.
      console: for output; None: the standard output.
    """

    def __init__(self, steps: int, console: Console | None = None):
        self._console = console or Console(highlight=False, soft_wrap=True, quiet=jax.process_index() != 0)
        self._steps = steps
        columns: list[Any] = [BarColumn(30), MofNCompleteColumn(), TextColumn("{task.description}")]
        self._live = Progress(*columns, console=self._console) if self._console.is_terminal else None
        if self._live is not None:
            self._task = self._live.add_task("compiling", total=steps)

    def step(self, step: int) -> None:
        """Moves the bar."""
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def compiling(self) -> None:
        """Says what the time before the first step is for; a live line says it already."""
        if self._live is None:
            self.say("compiling the first step")

    def show(self, step: int, values: dict[str, float]) -> None:
        """Shows the numbers of a logged step."""
        if self._live is not None:
            self._live.update(self._task, completed=step, description=summary(values))
        else:
            self.say(f"step {step}/{self._steps} | {summary(values)}")

    def say(self, text: str) -> None:
        """Prints a permanent line, above the live one; letters that the terminal does not know are escaped."""
        encoding = self._console.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        self._console.print(text, markup=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
