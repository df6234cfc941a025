"""Reads text into a memory and answers prompts: `python generate.py --workdir W --read FILE --prompt TEXT`."""

from lm2_jax import cli
from lm2_jax.commands.generate import main

if __name__ == "__main__":
    cli.run(main)
