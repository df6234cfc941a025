"""Names of models in tables and pictures: what a model is, not what its preset is called."""

from collections.abc import Callable, Sequence

from lm2_jax.config import ModelConfig, RunConfig

_NAMES: dict[str, Callable[[ModelConfig], str]] = {
    "none": lambda model: "baseline (no memory)",
    "tokens": lambda model: "RMT",
    "titans": lambda model: f"Titans, {_variant(model)}",
    "gated_bank": lambda model: f"LM2, {_write(model)}",
}
_VARIANTS = {"context": "MAC", "gate": "MAG", "layer": "MAL", "mixer": "LMM"}  # the paper's names of our joins


def model_name(model: ModelConfig) -> str:
    """The name of a model by its memory, such as "LM2, block write (ours)"; for a new memory its kind."""
    name = _NAMES.get(model.memory.kind)
    return f"{model.memory.kind}, {model.join.kind}" if name is None else name(model)


def distinct_names(configs: Sequence[RunConfig], workdirs: Sequence[str]) -> list[str]:
    """A different name for each run: by its memory, else with its preset, else with its workdir."""
    names = [model_name(config.model) for config in configs]
    for extra in ([config.name for config in configs], workdirs):
        doubled = {name for name in names if names.count(name) > 1}
        names = [f"{name}, {more}" if name in doubled else name for name, more in zip(names, extra, strict=True)]
    return names


def _write(model: ModelConfig) -> str:
    write = getattr(model.memory, "write").kind  # noqa: B009  memories of other kinds have no such field
    return f"{write} write" if write == "paper" else f"{write} write (ours)"


def _variant(model: ModelConfig) -> str:
    return _VARIANTS.get(model.join.kind, f"{model.join.kind} join")
