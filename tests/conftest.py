"""Which tests stay together where several processes run them, and which run only when they are asked for."""

from __future__ import annotations

import pytest

#: Folders whose files share what takes long to make.
TOGETHER = ("oracle",)
#: Folders and files that take a minute or more each; `launch/test.sh -m ""` runs them too.
SLOW = ("tests/faults/", "tests/distributed/test_hosts.py", "tests/launch/test_slurm.py", "tests/test_jobs.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of one file run in one process, one after the other, for the sake of its fixtures."""
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder in TOGETHER else str(item.path)))
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
