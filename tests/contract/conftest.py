"""Which subjects of the contract tests run in which lane."""

import pytest

from tests.contract.subjects import LONG, LONG_WHERE_SLOW


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Subjects that share their memory or most of their join with a faster one have a lane of their own."""
    for item in items:
        if "tests/contract/" not in item.nodeid or not hasattr(item, "callspec"):
            continue
        params, slow = item.callspec.params, item.get_closest_marker("slow")  # pyright: ignore
        name = params.get("name", params.get("exact"))
        if name in LONG or (slow and name in LONG_WHERE_SLOW):
            item.add_marker(pytest.mark.long)
