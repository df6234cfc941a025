import jax
import pytest

from lm2_jax.errors import UserError
from sharding import MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, model=2), (1, 4, 2, 1)),
        (MeshConfig(data=1, fsdp=2, model=2, slots=2), (1, 2, 2, 2)),
        (MeshConfig(data=2, fsdp=2, model=2, slots=-1), (2, 2, 2, 1)),
    ],
)
def test_sizes(config, sizes):
    mesh = make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "model", "slots")
    assert mesh.devices.shape == sizes
    assert set(mesh.devices.flat) == set(jax.devices())
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_uses_the_devices_it_is_given():
    devices = jax.devices()[2:6]
    assert set(make_mesh(MeshConfig(model=2), devices).devices.flat) == set(devices)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MeshConfig(data=3), ["multiply to 3", "8 devices", "mesh.data=3"]),
        (MeshConfig(data=2, fsdp=8), ["multiply to 16", "8 devices", "mesh.fsdp=8"]),
        (MeshConfig(model=3), ["8 devices", "multiple of 3", "mesh.model=3"]),
        (MeshConfig(fsdp=-1), ["one mesh size can be -1", "mesh.data=-1", "mesh.fsdp=-1"]),
        (MeshConfig(slots=0), ["at least 1", "mesh.slots=0"]),
        (MeshConfig(data=-2), ["at least 1", "mesh.data=-2"]),
    ],
)
def test_impossible_sizes_are_explained(config, words):
    with pytest.raises(UserError) as caught:
        make_mesh(config)
    assert all(word in str(caught.value) for word in words), caught.value
