"""The documentation lists exactly the architectures, RoPE types and kinds of GGUF files that the code reads."""

import re
from pathlib import Path

from lm2_jax.interop import gguf_file
from lm2_jax.interop.architectures import ARCHITECTURES
from lm2_jax.interop.hf_rope import ROPE_TYPES
from lm2_jax.rope import RopeScaling

PAGE = (Path(__file__).parents[2] / "docs" / "bring_your_own_model.md").read_text(encoding="utf-8")


def table(first: str) -> list[list[str]]:
    """The cells of the table whose first column has this title."""
    rows = PAGE[PAGE.index(f"| {first} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_classes_of_transformers():
    assert [(row[0].strip("`"), row[1]) for row in table("class")] == [
        (known.name, known.models) for known in ARCHITECTURES
    ]
    for row, known in zip(table("class"), ARCHITECTURES, strict=True):
        biases = set(known.biases.values())
        assert ("on queries, keys, values and the output" in row[2] or "as Llama" in row[2]) == ("qkvo" in biases)
        assert ("false" in row[2]) == ("none" in biases)
        assert ("always on queries, keys and values" in row[2]) == (biases == {"qkv"})


def test_types_of_rope():
    assert tuple(row[0].strip("`") for row in table("type")) == ROPE_TYPES
    assert set(ROPE_TYPES) == {"default", *RopeScaling.registry}


def test_gguf_files():
    (row,) = re.findall(r"^\| `\.gguf` file of the architecture (.*?): (.*?) \|", PAGE, re.M)
    assert tuple(re.findall(r"`(\w+)`", row[0])) == tuple(gguf_file.ARCHITECTURES)
    assert tuple(row[1].split(", ")) == gguf_file.QUANTIZATIONS
    assert set(gguf_file.ARCHITECTURES) <= {known.model_type for known in ARCHITECTURES}
