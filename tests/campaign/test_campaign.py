"""A short slice of the campaign; `make campaign` runs all of it."""

import pytest

from tests.campaign.cases import KINDS, Bench, run_case

SLICE = {"kill": 1, "signals": 2, "damage": 20, "tokenizer": 20, "disk": 1, "two": 1, "fuzz": 200, "numbers": 100}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("campaign"))


# A file-size limit is set between fork and exec, of which jax warns; the child calls exec at once.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in. <function _at_fork:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_breaks(kind, bench):
    failures = [run_case(kind, 1, case, bench) for case in range(SLICE[kind])]
    assert [failure for failure in failures if failure is not None] == []
