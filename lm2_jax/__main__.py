"""`python -m lm2_jax`: the same as the console command `lm2`."""

from lm2_jax.commands import main

if __name__ == "__main__":
    main()
