"""`lm2 list`: presets by family, with size, tokens a step, hardware and purpose."""

import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm2_jax import cli
from lm2_jax.arguments import ArgumentParser
from lm2_jax.config import ModelConfig, RunConfig
from lm2_jax.model import LanguageModel
from lm2_jax.presets import FAMILIES, PRESETS
from lm2_jax.registry import near_misses

SIZES = pathlib.Path(__file__).with_name("parameters.json")  # preset -> parameters, see `write_sizes`


def count_parameters(model: ModelConfig) -> int:
    """Parameters of a model, from shapes alone; takes about a second, as the model is traced."""
    module = LanguageModel(model)
    tokens = jax.ShapeDtypeStruct((1, model.segment_tokens), jnp.int32)
    shapes = nn.unbox(
        jax.eval_shape(lambda tokens: module.init(jax.random.key(0), tokens, module.init_state(1)), tokens)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def write_sizes() -> None:
    """Counts the parameters of all presets again and keeps them, so that the list appears at once."""
    SIZES.write_text(json.dumps({name: count_parameters(run.model) for name, run in PRESETS.items()}, indent=1) + "\n")


def tokens_per_step(run: RunConfig) -> int:
    """Tokens of a step in the last stage."""
    return run.data.rows * run.data.segments[-1] * run.model.segment_tokens


def table() -> str:
    """All presets by family, one line each."""
    sizes = json.loads(SIZES.read_text())
    width = max(map(len, PRESETS)) + 2
    lines = [f"{'preset':<{width}}  {'parameters':>10}  {'tokens/step':>11}  purpose"]
    for family in FAMILIES:
        lines += ["", f"{family.title} ({family.hardware})"]
        for name in family.presets:
            run = PRESETS[name]
            size = sizes[name] if name in sizes else count_parameters(run.model)
            lines.append(
                f"{f'  {name}':<{width}}  {_short(size):>10}  {tokens_per_step(run):>11,}  {family.purpose(name)}"
            )
    train = cli.program("train")
    return "\n".join([*lines, "", f"{train} PRESET trains one; {train} PRESET --help shows its options"])


def names_by_family() -> str:
    """The names of all presets, for a message."""
    return "\n".join(f"  {family.title}: {', '.join(family.presets)}" for family in FAMILIES)


def unknown_preset(name: str) -> str:
    """The message about a preset that does not exist: what may have been meant first, then all there are."""
    return f"unknown preset {name!r}.{near_misses(name, PRESETS)} Presets by family:\n{names_by_family()}"


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the list."""
    ArgumentParser(prog=cli.program("list"), description=__doc__).parse_args(arguments)
    print(table())


if __name__ == "__main__":
    write_sizes()
