"""`python -m lm2_jax.demo`."""

from lm2_jax import cli
from lm2_jax.demo.program import main

if __name__ == "__main__":
    cli.run(main)
