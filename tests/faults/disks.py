"""Real disks that fail, for as long as a test lasts. All need root; where they cannot be had, tests are skipped."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.launching import REPOSITORY

_MOUNTED_SECONDS = 20.0


def why_no_fuse() -> str:
    """Why a file system of ours cannot be mounted here; "" where it can."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "a file system that fails needs root and /dev/fuse"
    if importlib.util.find_spec("mfusepy") is None:
        return "a file system that fails needs the package mfusepy"
    try:
        importlib.import_module("mfusepy")
    except OSError:
        return "a file system that fails needs libfuse (on Debian and Ubuntu, the package libfuse2 or libfuse3-3)"
    return ""


@dataclass(frozen=True)
class FaultyDisk:
    """A mounted file system that fails where it is told to.

    Attributes:
        path: where it is mounted.
        behind: the directory that it shows.
    """

    path: Path
    behind: Path

    def fail(self, call: str, file: str, answer: str, **more: Any) -> None:
        """From now on, answer calls so; `at` and `changed` as in `faulty_file_system`."""
        self._tell([{"call": call, "file": file, "answer": answer, **more}])

    def heal(self) -> None:
        """From now on, fail no more."""
        self._tell([])

    def _tell(self, rules: list[dict[str, Any]]) -> None:
        fresh = self.behind.with_suffix(".new-rules")
        fresh.write_text(json.dumps(rules))
        fresh.rename(self.behind.with_suffix(".rules"))


@contextmanager
def faulty_disk(root: Path) -> Iterator[FaultyDisk]:
    """Mount a file system that shows `root`/behind at `root`/mounted."""
    disk = FaultyDisk(root / "mounted", root / "behind")
    disk.path.mkdir(parents=True)
    disk.behind.mkdir()
    disk.heal()
    program = [sys.executable, "-m", "tests.faults.faulty_file_system"]
    words = [str(disk.behind), str(disk.path), str(disk.behind.with_suffix(".rules"))]
    with subprocess.Popen([*program, *words], cwd=REPOSITORY) as process:
        try:
            deadline = time.monotonic() + _MOUNTED_SECONDS
            while not disk.path.is_mount():
                assert process.poll() is None
                assert time.monotonic() < deadline, "the file system is not mounted"
                time.sleep(0.02)
            yield disk
        finally:
            subprocess.run(["umount", "--lazy", str(disk.path)], check=True)
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()  # a call that hangs
