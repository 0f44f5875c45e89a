"""Which tests run only when they are asked for, and what tests of several folders start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.distributed.interrupting import Runs, interrupted_runs
from tests.file_systems import mounted

#: Folders and files that take a minute or more each; `launch/test.sh -m ""` runs them too.
SLOW = ("tests/faults/", "tests/distributed/test_hosts.py", "tests/launch/test_slurm.py", "tests/test_jobs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    """Ranks that are quick to start, and that can be stopped at any moment."""
    with interrupted_runs() as started:
        yield started


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts an empty file system in memory, with options such as "size=16k", until the test ends."""
    with ExitStack() as stack:

        def make(options: str) -> Path:
            point = tmp_path / "disk"
            point.mkdir()
            stack.enter_context(mounted("-t", "tmpfs", "-o", options, "dist-convert-test", str(point)))
            return point

        yield make
