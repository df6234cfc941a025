"""Which subjects of the contract tests run in which lane."""

import pytest

from tests.contract.subjects import LONG


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Subjects that share their memory or most of their join with a faster one have a lane of their own."""
    for item in items:
        call = getattr(item, "callspec", None)
        if call is not None and call.params.get("name") in LONG and "tests/contract/" in item.nodeid:
            item.add_marker(pytest.mark.long)
