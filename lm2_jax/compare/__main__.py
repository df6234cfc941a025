"""`python -m lm2_jax.compare`."""

from lm2_jax import cli
from lm2_jax.commands.compare import main

if __name__ == "__main__":
    cli.run(main)
