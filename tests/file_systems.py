"""File systems for as long as a test lasts. They need root; where they cannot be had, tests are skipped."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def mounted(*words: str) -> Iterator[None]:
    """Mount something with mount(8), whose last word is the mount point."""
    try:
        done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"there is no mount(8): {error}")
    if done.returncode:
        pytest.skip(f"mounting a file system needs root: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", words[-1]], check=True)


def remount(*words: str) -> None:
    """Change how something is mounted."""
    subprocess.run(["mount", "-o", *words], check=True)
