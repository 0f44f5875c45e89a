"""Which tests stay together where several processes run them (`pytest --numprocesses N --dist loadgroup`)."""

from __future__ import annotations

import pytest

#: Folders whose files share what takes long to make.
TOGETHER = ("oracle",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of one file run in one process, one after the other, for the sake of its fixtures."""
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder in TOGETHER else str(item.path)))
