"""What a suite of `eval.py` is."""

import dataclasses

from lm2_jax.registry import Family


@dataclasses.dataclass(frozen=True)
class Suite(Family):
    """Base of all suites: the fields are the command line, `kind` the name of the subcommand."""

    def main(self) -> None:
        """Evaluates, prints and writes the files; bad input is a `UserError`."""
        raise NotImplementedError
