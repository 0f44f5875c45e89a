"""File systems for as long as a test lasts. They need root; where they cannot be had, tests are skipped."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def make_ext4(image: Path, size_bytes: int) -> None:
    """An ext4 file system in a file, to be mounted with `-o loop`; all of its space is for everybody."""
    with image.open("wb") as file:
        file.truncate(size_bytes)
    words = ["mkfs.ext4", "-q", "-F", "-m", "0", "-b", "1024", "-O", "^has_journal", str(image)]
    if shutil.which(words[0]) is None or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("an ext4 file system needs mkfs.ext4")


def remount(*words: str) -> None:
    """Change how something is mounted."""
    subprocess.run(["mount", "-o", *words], check=True)
