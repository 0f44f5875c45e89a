"""What all attacks start from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attacks.watched import Watcher, watcher


@pytest.fixture(scope="session")
def watched() -> Iterator[Watcher]:
    with watcher() as started:
        yield started
