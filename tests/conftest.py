"""Which tests run only when they are asked for."""

from __future__ import annotations

import pytest

#: Folders and files that take a minute or more each; `launch/test.sh -m ""` runs them too.
SLOW = ("tests/faults/", "tests/distributed/test_hosts.py", "tests/launch/test_slurm.py", "tests/test_jobs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
