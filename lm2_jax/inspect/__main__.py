"""`python -m lm2_jax.inspect --workdir W --text FILE [--question Q] --out DIR`."""

from lm2_jax import cli
from lm2_jax.inspect.program import main

if __name__ == "__main__":
    cli.run(main)
