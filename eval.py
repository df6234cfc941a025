"""Evaluates a trained run: `python eval.py SUITE --workdir W`; `--help` lists the suites."""

import tyro

from lm2_jax import cli
from lm2_jax.evaluation import SUITES


def main() -> None:
    """Parses the command line and runs the suite it names."""
    suite = tyro.extras.subcommand_cli_from_dict(SUITES, description=__doc__)
    suite.main()


if __name__ == "__main__":
    cli.run(main)
