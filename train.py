"""Trains a preset: `python train.py PRESET [--workdir W] [--section.field VALUE ...]`; `--list` shows presets."""

from lm2_jax import cli
from lm2_jax.commands.train import main

if __name__ == "__main__":
    cli.run(main)
