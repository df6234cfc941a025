"""A short slice of the campaign; `make campaign` runs all of it."""

import pytest

from tests.campaign.cases import KINDS, Bench, run_case

SLICE = {"kill": 2, "signals": 2, "damage": 20, "disk": 1, "two": 1, "fuzz": 200}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("campaign"))


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_breaks(kind, bench):
    failures = [run_case(kind, 1, case, bench) for case in range(SLICE[kind])]
    assert [failure for failure in failures if failure is not None] == []
