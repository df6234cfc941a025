"""Presets that are compared have equal parameters, and the list of presets says what is so."""

import json

import pytest

import lm2_jax
from configs import babilong_small, probe, probe_methods, probe_titans
from lm2_jax.commands import overview
from lm2_jax.presets import FAMILIES

SIZES = json.loads(overview.SIZES.read_text())


def parameters(name: str) -> int:
    """How many parameters a preset has, without making them."""
    return overview.count_parameters(lm2_jax.preset(name).model)


def test_every_preset_has_a_purpose_and_every_family_its_hardware():
    assert {name for family in FAMILIES for name in family.presets} == set(lm2_jax.PRESETS)
    purposes = [family.purpose(name) for family in FAMILIES for name in family.presets]
    assert all(10 < len(purpose) <= 72 for purpose in purposes), [p for p in purposes if not 10 < len(p) <= 72]
    assert all(family.hardware != "any" for family in FAMILIES), "name it in the file: HARDWARE"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name.startswith(("lm2", "rmt")) else pytest.mark.slow) for name in sorted(SIZES)],
)
def test_parameters_in_the_list_are_right(name):
    """After a change of the model: `python -m lm2_jax.commands.overview`."""
    assert parameters(name) == SIZES[name]


def test_the_list_knows_no_preset_that_is_gone():
    assert SIZES.keys() <= lm2_jax.PRESETS.keys()


PROBES = {**probe.PRESETS, **probe_titans.PRESETS, **probe_methods.PRESETS}


@pytest.mark.parametrize("name", sorted({*PROBES, *babilong_small.PRESETS}))
def test_compared_presets_have_equal_parameters(name):
    baseline = "babilong_small_none" if name in babilong_small.PRESETS else "probe_none"
    assert abs(parameters(name) / parameters(baseline) - 1) < 0.03


def test_small_means_at_most_three_million_parameters():
    assert max(parameters(name) for name in babilong_small.PRESETS) <= 3_000_000
