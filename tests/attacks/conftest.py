"""What all attacks start from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.unfinished import stopped
from tests.attacks.watched import Watcher, watcher


@pytest.fixture(scope="session")
def watched() -> Iterator[Watcher]:
    with watcher() as started:
        yield started


@pytest.fixture(scope="session")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `stopped`; to be copied."""
    return stopped(tmp_path_factory.mktemp("unfinished"))


@pytest.fixture
def left(unfinished: Path, tmp_path: Path) -> Path:
    """A partial directory of this test's own."""
    shutil.copytree(unfinished / "place", tmp_path / "place")
    return tmp_path / "place" / "out.partial"
