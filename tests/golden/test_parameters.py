"""Names, shapes and logical axes of all parameters and states: what checkpoints and sharding rely on.

A change here means that old checkpoints no longer fit. If that is intended, run

    python -m pytest tests/golden --update-golden

and say so in the CHANGELOG.
"""

import json
from pathlib import Path

import jax
import pytest
from flax import linen as nn

import lm2_jax
from lm2_jax.layout import axes_of
from tests.contract.subjects import TINY, abstract_params

FOLDER = Path(__file__).parent / "parameters"


def described(axes, shapes) -> dict[str, list]:
    """By path: the shape and the names of its dimensions."""
    names = jax.tree.structure(shapes).flatten_up_to(axes)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(leaf.shape), list(axes_of_leaf)]
        for (path, leaf), axes_of_leaf in zip(jax.tree_util.tree_leaves_with_path(shapes), names, strict=True)
    }


@pytest.mark.parametrize("name", TINY)
def test_parameters_and_state_are_as_written_down(name, request):
    model, file = lm2_jax.build_model(lm2_jax.preset(name).model), FOLDER / f"{name}.json"
    boxed = abstract_params(model)
    state = jax.eval_shape(lambda: model.init_state(7))
    found = {
        "params": described(axes_of(boxed), nn.unbox(boxed)),
        "state": described(model.state_axes(), state),
    }
    if request.config.getoption("--update-golden"):
        FOLDER.mkdir(exist_ok=True)
        lines = [
            f"  {json.dumps(part)}: {{\n"
            + ",\n".join(f"    {json.dumps(path)}: {json.dumps(leaf)}" for path, leaf in sorted(leaves.items()))
            + "\n  }"
            for part, leaves in found.items()
        ]
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert file.is_file(), f"{file} does not exist; see the top of this file"
    assert found == json.loads(file.read_text()), "see the top of this file"


def test_there_is_no_file_without_a_preset():
    assert {file.stem for file in FOLDER.glob("*.json")} == set(TINY)
