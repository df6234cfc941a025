"""Which subjects of the contract tests run in which lane."""

import pytest

from tests.contract.subjects import LONG, LONG_WHERE_SLOW, SLOW_TINY, TINY

# Of subjects that are long, the slow lane runs these: causality, rows, reset, padding and gradients; of presets also
# that any split of a text is one call, and of one preset that it is in float32 too.
PROMISES = ("test_promises.py",)
SPLITS = ("test_any_split_equals_one_call_in_float64", "test_a_split_at_every_position", "test_rows_of_unequal_length")
# Of subjects in SLOW_TINY.
FAST = ("test_a_token_changes_nothing_before_it[", "test_any_split_equals_one_call_in_float64", "test_padding_changes")
IN_FLOAT32 = ("test_pieces_equal_one_call",)


def in_slow_lane(nodeid: str, name: str) -> bool:
    """Whether a test of a subject that is long stays out of the lane of its own."""
    tests = PROMISES + SPLITS * (name in TINY) + IN_FLOAT32 * (name in LONG_WHERE_SLOW)
    return any(test in nodeid for test in tests)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Subjects that share their memory or most of their join with a faster one have a lane of their own."""
    for item in items:
        if "tests/contract/" not in item.nodeid or not hasattr(item, "callspec"):
            continue
        params, slow = item.callspec.params, item.get_closest_marker("slow")  # pyright: ignore
        name = params.get("name", params.get("exact"))
        if name in SLOW_TINY and not slow and not any(test in item.nodeid for test in FAST):
            item.add_marker(pytest.mark.slow)
        if name in LONG or (slow and name in LONG_WHERE_SLOW):
            item.add_marker(pytest.mark.slow if in_slow_lane(item.nodeid, name) else pytest.mark.long)
