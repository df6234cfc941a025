"""Evaluates a trained run: `python eval.py SUITE --workdir W`; see lm2_jax/commands/eval.py."""

from lm2_jax import cli
from lm2_jax.commands.eval import main

if __name__ == "__main__":
    cli.run(main)
