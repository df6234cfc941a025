"""generate.py on a tiny run that needs no training: python tests/inference/program.py PRESET [OPTION ...]."""

import sys

from lm2_jax import cli, runs
from lm2_jax.commands import generate
from tests.inference.subjects import tiny_run


def main() -> None:
    runs.load_run = lambda workdir: tiny_run(sys.argv[1])
    generate.main(["--workdir", "tiny", *sys.argv[2:]])


if __name__ == "__main__":
    cli.run(main)
