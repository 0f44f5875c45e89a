"""Conversions under watch of what may do harm, and what they must not have done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.attacks.watched import Seen, Watcher

MOST_MEMORY_BYTES = 300 << 20
MOST_SECONDS = 20.0
SECRET = "the secret"
#: More layers, experts or ranks than memory holds.
ABSURD = 10**18


def run(watched: Watcher, direction: str, root: Path) -> Seen:
    """Convert `root`/source, watched."""
    paths = ("--load-path", "--save-path") if direction == "megatron-to-hf" else ("--load-dir", "--save-dir")
    target = root / "target" / "hf"
    return watched.run(direction, paths[0], str(root / "source"), paths[1], str(target), "--device", "cpu")


def assert_harmless(seen: Seen, root: Path) -> None:
    """Only the two directories were touched, at little cost, and nothing was started."""
    assert seen.exit_code >= 0, seen  # a signal is what a limit ends a process with
    # A target that is complete gets the usual rights, by its own descriptor.
    usual = re.compile(rf"os\.chmod \('{re.escape(str(root))}/target/.*|os\.chmod \(\d+, 493, -1\)")
    assert [one for one in seen.events if not usual.fullmatch(one)] == []
    inside = (f"{root}/source", f"{root}/target")
    assert [path for path in seen.opened if not path.startswith(inside)] == []
    assert seen.peak_bytes < MOST_MEMORY_BYTES
    assert seen.seconds < MOST_SECONDS
    assert not (root / "canary").exists()
    assert SECRET not in seen.printed
    for path in root.glob("target/**/*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def assert_refused(seen: Seen, root: Path, shown: str) -> None:
    """The conversion failed with an error of ours that says this, and made nothing."""
    assert_harmless(seen, root)
    assert seen.exit_code == 1, seen
    assert "Traceback" not in seen.printed
    assert "internal error" not in seen.printed
    assert shown in seen.printed
    assert not (root / "target").exists()


def assert_shown_without_harm(seen: Seen, root: Path) -> None:
    """Looking at a checkpoint does no more than converting it, and answers or fails with an error of ours."""
    assert_harmless(seen, root)
    assert seen.exit_code in (0, 1), seen
    assert "Traceback" not in seen.printed


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
