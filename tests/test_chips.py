"""The table of chips: every kind that the documentation offers has a peak, for MFU and for --compile-only alike."""

import re
from pathlib import Path

import pytest

from lm2_jax.aot.topology import SLICES, parse_topology
from lm2_jax.chips import CHIPS, GIB, find_chip, peak_flops

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 2307e12 / 2),  # two devices per chip
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


def offered() -> list[tuple[str, str, int, float]]:
    """Topology, chip, bytes of memory and FLOP/s of each row of the table of chips in docs/tpu.md."""
    rows = re.findall(
        r"^\| \S+ \| `((\w+):[\dx]+)` \| (?:(\d) x )?(\d+) GiB \| (\d+) TFLOP/s \|",
        (ROOT / "docs" / "tpu.md").read_text(),
        re.M,
    )
    return [(name, chip, int(parts or 1) * int(gib) * GIB, float(peak) * 1e12) for name, chip, parts, gib, peak in rows]


def test_the_documentation_offers_what_compile_only_knows():
    assert {chip for _, chip, _, _ in offered()} == set(SLICES)
    for topology, chip, hbm_bytes, flops in offered():
        assert parse_topology(topology).chip is CHIPS[chip]
        assert (CHIPS[chip].hbm_bytes, CHIPS[chip].flops) == (hbm_bytes, flops)


@pytest.mark.parametrize("name", sorted(SLICES))
def test_every_chip_on_offer_has_all_figures(name):
    chip = CHIPS[name]
    assert min(chip.flops, chip.hbm_bytes, chip.hbm_bandwidth, chip.ici_bandwidth or 0, chip.dcn_bandwidth or 0) > 0


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_each_kind_of_device_belongs_to_its_own_chip(chip):
    for kind in chip.device_kinds:
        assert find_chip(kind) is chip
