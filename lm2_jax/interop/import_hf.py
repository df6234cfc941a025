"""`python -m lm2_jax.interop.import_hf SOURCE --workdir W`; the same as `lm2 import`."""

from lm2_jax import cli
from lm2_jax.commands.import_hf import main

if __name__ == "__main__":
    cli.run(main)
