"""The format of workdirs and checkpoints, and which formats this version reads."""

import hashlib
import importlib.metadata
import json
from typing import Any

from lm2_jax.errors import UserError

# 1: stacked layers, an order-independent checksum, no number in the files.
# 2: one array for each layer, checksums by name and place, config and tokenizer tied to every checkpoint.
# 3: a config with fields that came later; the files are as in 2.
# 4: the same again, with options for answers of several tokens, and for attention with biases and norms; RoPE scalings
#    have a kind.
FORMAT = 5


def package_version() -> str:
    """The installed version of lm2_jax, or `unknown` where it runs from a source folder."""
    try:
        return importlib.metadata.version("lm2-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def stamp() -> dict[str, Any]:
    """What every file with a format begins with."""
    return {"format": FORMAT, "version": package_version()}


def check_format(plain: Any, what: str) -> int:
    """The format of a table that was read.

    Args:
      plain: the table; one without a number has format 1.
      what: the file, for the message.
    Raises:
      UserError: the format is newer than this version reads.
    """
    written = plain.get("format", 1) if isinstance(plain, dict) else 1
    if not isinstance(written, int) or isinstance(written, bool) or written < 1:
        raise UserError(f"{what}: damaged, its format is {written!r}, expected a whole number", status=1)
    if written > FORMAT:
        raise UserError(
            f"{what} has format {written}, written by lm2_jax {plain.get('version', 'of an unknown version')}; this is "
            f"lm2_jax {package_version()}, which reads formats 1 to {FORMAT}. Install the newer version.",
            status=1,
        )
    return written


def digest(plain: Any) -> str:
    """A hash of JSON types that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
