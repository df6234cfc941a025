"""The programs: `lm2 train`, `lm2 eval` and others; train.py and eval.py call the same functions.

Messages name a program by `lm2_jax.cli.program`, because not everyone has train.py.

Only this package of lm2_jax may import `lm2_jax.sharding`: it is where models and device meshes meet.
"""

import importlib
import pathlib
import sys
from collections.abc import Sequence

from lm2_jax.errors import UserError
from lm2_jax.registry import near_misses

# Imported when they are called: each loads only what it needs.
PROGRAMS = {
    "train": ("lm2_jax.commands.train", "trains a preset, or resumes a run"),
    "eval": ("lm2_jax.commands.eval", "evaluates a trained run"),
    "generate": ("lm2_jax.commands.generate", "reads texts into a memory, and continues prompts"),
    "import": ("lm2_jax.commands.import_hf", "turns a Llama checkpoint into a run, with a memory if wanted"),
    "export": ("lm2_jax.interop.export_hf", "turns a run into a folder for transformers or from_pretrained"),
    "inspect": ("lm2_jax.inspect.program", "shows what a memory reads, writes and forgets of a text"),
    "compare": ("lm2_jax.commands.compare", "trains and evaluates presets under one protocol"),
    "convert": ("lm2_jax.data.convert", "turns text into token shards"),
    "list": ("lm2_jax.commands.overview", "lists the presets by family"),
    "demo": ("lm2_jax.demo.program", "reads a long text once and answers from the saved memory"),
    "quickstart": ("lm2_jax.quickstart", "trains and compares a small LM2 and its baseline on a CPU"),
}


def call(arguments: Sequence[str]) -> None:
    """Calls the program that the first argument names with the others."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {_prefix()} PROGRAM [OPTIONS]; {_prefix()} PROGRAM --help shows the options\n")
        print("\n".join(f"  {name:<11} {does}" for name, (_, does) in PROGRAMS.items()))
        return
    name, *rest = arguments
    if name not in PROGRAMS:
        raise UserError(
            f"{_prefix()}: no program {name!r}; there are {', '.join(PROGRAMS)}.{near_misses(name, PROGRAMS)}"
        )
    sys.argv = [f"{_prefix()} {name}", *rest]
    importlib.import_module(PROGRAMS[name][0]).main()


def _prefix() -> str:
    return "lm2" if pathlib.Path(sys.argv[0]).stem == "lm2" else "python -m lm2_jax"


def main() -> None:
    """The console command `lm2`."""
    from lm2_jax import cli

    cli.run(lambda: call(sys.argv[1:]))
