import dataclasses
import os

import jax
import pytest

from lm2_jax.errors import UserError
from lm2_jax.sharding import MeshConfig, make_mesh, mesh
from lm2_jax.sharding.mesh import planned_mesh, spare_threads


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
    made = make_mesh(config)
    assert made.axis_names == ("data", "fsdp", "model", "slots")
    assert made.devices.shape == sizes
    assert set(made.devices.flat) == set(jax.devices())
    assert set(made.axis_types) == {jax.sharding.AxisType.Auto}


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


class Chip:
    """A device of a job that spans several slices."""

    platform, device_kind, process_index = "cpu", "chip", 0

    def __init__(self, index, slices):
        self.id, self.slice_index = index, index * slices // 8

    def __repr__(self):
        return f"chip {self.id} of slice {self.slice_index}"


def test_only_copies_of_the_model_lie_in_different_slices():
    chips = [Chip(index, 2) for index in (5, 0, 3, 6, 1, 4, 7, 2)]
    for slices in (None, 2):
        made = make_mesh(MeshConfig(data=4, model=2, slices=slices), chips)  # pyright: ignore[reportArgumentType]
        assert made.devices.shape == (4, 1, 2, 1)
        assert [{chip.slice_index for chip in copy.flat} for copy in made.devices] == [{0}, {0}, {1}, {1}]


def test_devices_that_do_not_say_their_slice_are_cut_into_pieces():
    made = make_mesh(MeshConfig(data=2, fsdp=4, slices=2))
    assert [sorted(device.id for device in piece.flat) for piece in made.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("config", "slices", "words"),
    [
        (MeshConfig(data=3, fsdp=-1), 2, ["8 devices", "mesh.data=3"]),
        (MeshConfig(data=1, fsdp=8), 2, ["mesh.data=1", "2 slices"]),
        (MeshConfig(slices=4), 2, ["mesh.slices=4", "2 slices"]),
        (MeshConfig(slices=2), 1, ["mesh.slices=2", "one slice"]),
    ],
)
def test_impossible_slices_are_explained(config, slices, words):
    with pytest.raises(UserError) as caught:
        make_mesh(config, [Chip(index, slices) for index in range(8)])  # pyright: ignore[reportArgumentType]
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_further_axis_needs_a_field_and_a_name_only(monkeypatch):
    """Such as `stage`, for a pipeline over layers."""

    @dataclasses.dataclass(frozen=True)
    class WithStages(MeshConfig):
        stage: int = 1

    monkeypatch.setattr(mesh, "AXES", (*mesh.AXES, "stage"))
    made = make_mesh(WithStages(fsdp=2, stage=2))
    assert made.shape == {"data": 2, "fsdp": 2, "model": 1, "slots": 1, "stage": 2}
    assert planned_mesh(WithStages(stage=4)).shape["stage"] == 4


def test_a_planned_mesh_needs_no_devices():
    assert planned_mesh(MeshConfig(fsdp=512, slots=16)).shape == {"data": 1, "fsdp": 512, "model": 1, "slots": 16}
    with pytest.raises(UserError, match="at least 1"):
        planned_mesh(MeshConfig(fsdp=0))


@pytest.mark.parametrize(("devices", "given", "threads"), [(8, None, "64"), (8, "3", "3"), (1, None, None)])
def test_virtual_devices_have_threads_to_wait_in(monkeypatch, devices, given, threads):
    monkeypatch.delenv("NPROC")
    if given is not None:
        monkeypatch.setenv("NPROC", given)
    spare_threads(devices)
    assert os.environ.get("NPROC") == threads
