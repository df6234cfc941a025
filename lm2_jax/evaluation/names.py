"""Names of models in tables and pictures: what a model is, not what its preset is called."""

from collections.abc import Callable, Sequence
from typing import Any

from lm2_jax.config import ModelConfig, RunConfig
from lm2_jax.decoder import DecoderConfig

_NAMES: dict[str, Callable[[Any, str], str]] = {
    "tokens": lambda memory, join: "RMT",
    "titans": lambda memory, join: f"Titans, {_VARIANTS.get(join, f'{join} join')}",
    "gated_bank": lambda memory, join: _bank_name(memory.write.kind, join),
    "associative": lambda memory, join: _with_join("ARMT", join, "layer_tokens"),
    "compressive": lambda memory, join: _with_join("Infini-attention", join, "heads"),
    "gated_delta": lambda memory, join: _with_join("gated delta rule", join, "mixer"),
    "hierarchical": lambda memory, join: _with_join("HMT", join, "recall"),
}
"""By kind of memory: its config and the kind of its join -> the name."""
_VARIANTS = {"context": "MAC", "gate": "MAG", "layer": "MAL", "mixer": "LMM"}  # the paper's names of our joins


def model_name(model: ModelConfig) -> str:
    """The name of a model by its memory, such as "LM2, block write (ours)"; for an unnamed memory its kind and join."""
    parts = getattr(model.join, "parts", ())  # a join of several memories
    if parts:
        return "hybrid of " + " and ".join(map(_name, parts))
    return f"baseline ({_attention(model.decoder)})" if model.memory.kind == "none" else _name(model)


def distinct_names(
    configs: Sequence[RunConfig], workdirs: Sequence[str], labels: Sequence[Callable[[str], str]] = ()
) -> list[str]:
    """A different name for each run: by its memory, else with its preset, else with its workdir.

    Args:
      configs: of the runs.
      workdirs: of the runs.
      labels: of each run, the name of how it is asked, from its name by its memory; empty: all are asked directly.
    """
    names = [model_name(config.model) for config in configs]
    names = [label(name) for label, name in zip(labels, names, strict=True)] if labels else names
    for extra in ([config.name for config in configs], workdirs):
        doubled = {name for name in names if names.count(name) > 1}
        names = [f"{name}, {more}" if name in doubled else name for name, more in zip(names, extra, strict=True)]
    return names


def _name(owner: Any) -> str:
    """The name of whatever has a memory and a join."""
    name = _NAMES.get(owner.memory.kind)
    return f"{owner.memory.kind}, {owner.join.kind} join" if name is None else name(owner.memory, owner.join.kind)


def _attention(decoder: DecoderConfig) -> str:
    """What a decoder without memory sees of earlier segments."""
    if decoder.max_tokens is not None:
        return "full attention"
    return "no memory" if decoder.window_tokens is None else "sliding window"


def _with_join(name: str, join: str, usual: str) -> str:
    return name if join == usual else f"{name}, {join} join"


def _bank_name(write: str, join: str) -> str:
    words = f"LM2, {write} write" if join == "residual" else f"LM2, {write} write, {join} join"
    return words if (write, join) == ("paper", "residual") else f"{words} (ours)"
