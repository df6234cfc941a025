"""Trains a preset: `python train.py PRESET [--workdir W] [--section.field VALUE ...]`; `--list` shows presets."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the work begins, Ctrl-C ends the process without a traceback

from lm2_jax import cli
from lm2_jax.commands.train import main

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.run(main)
