"""Names of TPU slices: which there are, and what a wrong one is told."""

import importlib.util
import math

import pytest

from lm2_jax.errors import UserError
from lm2_jax.sharding.topology import CHIPS, compile_only_devices, parse_topology


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
    """Chips of the largest slices, and bytes of memory for an operation a second, which lie close for all kinds."""
    assert {name: math.prod(chip.largest or chip.shapes[-1]) for name, chip in CHIPS.items()} == {
        "v5e": 256,
        "v5p": 6144,
        "v6e": 256,
        "tpu7x": 9216,
    }
    for chip in CHIPS.values():
        assert 100 < chip.flops / chip.hbm_bandwidth < 600
        assert chip.dcn_bandwidth < chip.ici_bandwidth / 30
        assert all(len(shape) == chip.dimensions for shape in chip.shapes)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"needs libtpu.*pip install -r requirements-tpu.txt") as caught:
        compile_only_devices(parse_topology("v5e:2x2"))
    assert caught.value.status == 1
