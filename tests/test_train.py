"""What train.py makes of its command line; tests/e2e has it as people call it."""

import sys

import pytest

import train
from lm2_jax.presets import mesh_for
from lm2_jax.sharding import MeshConfig


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], mesh_for("lm2_1p7b", 16)),
        (["--mesh.data", "-1"], MeshConfig()),
        (["--mesh.fsdp=4"], MeshConfig(fsdp=4)),
    ],
)
def test_the_mesh_of_a_preset_is_taken_where_none_is_asked_for(monkeypatch, words, expected):
    """Even where the one that is asked for is the default."""
    meshes = []

    def tell(run, mesh, compilation):
        meshes.append(mesh(16))
        return 0

    monkeypatch.setattr(train, "compile_and_report", tell)
    monkeypatch.setattr(train.os, "_exit", sys.exit)
    arguments = ["lm2_1p7b", *words, "--compile-only", "--topology", "v5e:4x4"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit):
        train.main()
    assert meshes == [expected]
    assert mesh_for("lm2_1p7b", 16) != MeshConfig()
