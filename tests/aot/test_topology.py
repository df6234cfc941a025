"""Names of TPU slices: which exist, and the errors for the others."""

import importlib.util
import math

import pytest

from lm2_jax.aot.topology import SLICES, compile_only_devices, parse_topology
from lm2_jax.chips import CHIPS, find_chip
from lm2_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "chips", "devices", "slices"),
    [
        ("v5e:1x1", 1, 1, 1),
        ("v5e:16x16", 256, 256, 1),
        ("V6E:2x4", 8, 8, 1),
        ("v5p:2x2x1", 4, 4, 1),
        ("v5p:16x16x24", 6144, 6144, 1),
        ("tpu7x:4x4x8", 128, 256, 1),
        ("2xv5e:16x16", 512, 512, 2),
        ("16xv5e:16x16", 4096, 4096, 16),
    ],
)
def test_slices_that_exist(name, chips, devices, slices):
    topology = parse_topology(name)
    assert (topology.chips, topology.devices, topology.slices) == (chips, devices, slices)
    assert str(topology) == name.lower()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e", "expected CHIP:SHAPE"),
        ("v5e:16*16", "expected CHIP:SHAPE"),
        ("16x16", "expected CHIP:SHAPE"),
        ("v4:2x2x1", "unknown chip 'v4'; known: .*v5e"),
        ("v5ee:2x2", "Did you mean 'v5e'"),
        ("v5e:32x32", "there is no slice 'v5e:32x32'. v5e slices are 1x1, .*16x16; several of them"),  # libtpu takes it
        ("v5e:4x2", "there is no slice"),
        ("v5e:4x4x4", "there is no slice"),
        ("v5p:4x4", "there is no slice"),
        ("v5p:4x4x6", "multiples of 4 with A <= B <= C up to 16x16x24"),
        ("v5p:16x16x28", "there is no slice"),
        ("v5p:8x4x4", "there is no slice"),
        ("0xv5e:2x2", "there is no slice"),
    ],
)
def test_slices_that_do_not_exist(name, words):
    with pytest.raises(UserError, match=words) as caught:
        parse_topology(name)
    assert caught.value.status == 2


def test_the_table_agrees_with_the_pages():
    """Chips of the largest slices, and operations per byte of memory traffic, which are similar for all kinds."""
    assert {name: math.prod(shapes.largest or shapes.listed[-1]) for name, shapes in SLICES.items()} == {
        "v5e": 256,
        "v5p": 6144,
        "v6e": 256,
        "tpu7x": 9216,
    }
    for name, shapes in SLICES.items():
        chip = CHIPS[name]
        assert chip.dcn_bandwidth < chip.ici_bandwidth / 30
        assert len({len(shape) for shape in (*shapes.listed, *filter(None, [shapes.largest]))}) == 1
    for chip in CHIPS.values():
        assert 100 < chip.flops / chip.hbm_bandwidth < 600


@pytest.mark.tpu_backend
@pytest.mark.parametrize("name", sorted(SLICES))
def test_libtpu_calls_its_devices_as_the_table_does(name):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install -r requirements-tpu.txt")
    shape = next(shape for shape in SLICES[name].listed if math.prod(shape) == 4)
    device = compile_only_devices(parse_topology(f"{name}:{'x'.join(map(str, shape))}"))[0]
    assert find_chip(device.device_kind) is CHIPS[name]


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"needs libtpu.*pip install -r requirements-tpu.txt") as caught:
        compile_only_devices(parse_topology("v5e:2x2"))
    assert caught.value.status == 1
