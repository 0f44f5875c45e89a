"""Conversions that are stopped at chosen moments, by `programs.interrupted_runs` in a process of its own."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.launching import REPOSITORY, environment


@dataclass(frozen=True)
class Run:
    """What became of a run.

    Attributes:
        exit_codes: of the ranks; negative for the signal that ended one.
        calls: that each rank made to the operating system; the moments at which it can be stopped.
        written_bytes: of tensors, by all ranks.
        stdout, stderr: of the ranks.
        seconds: until the last rank had ended.
    """

    exit_codes: list[int]
    calls: list[int]
    written_bytes: int
    stdout: list[str]
    stderr: list[str]
    seconds: float

    @property
    def printed(self) -> str:
        return "".join(self.stderr)


@dataclass(frozen=True)
class Runs:
    """The process that forks ranks."""

    process: subprocess.Popen[str]

    def do(self, flags: list[str], **how: Any) -> Run:
        """Run a command line.

        Args:
            flags: of `dist_convert`.
            how: ranks, and on how many nodes; and rank, moment (number of a call of that rank), signals, all (whether
                every rank gets them),
                pause_seconds before them, patience_seconds from a rank's end to the others' SIGTERM; before, a module
                of `programs` that prepares each rank, and arguments.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"flags": flags, **how}) + "\n")
        self.process.stdin.flush()
        return Run(**json.loads(self.process.stdout.readline()))


@contextmanager
def interrupted_runs() -> Iterator[Runs]:
    """Start the process, and end it."""
    program = [sys.executable, "-m", "tests.distributed.programs.interrupted_runs"]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment()
    ) as process:
        yield Runs(process)
        assert process.stdin is not None
        process.stdin.close()


def hashes_below(root: Path) -> dict[str, str]:
    """SHA-256 of every file below a root, but for empty ones that a rank was killed over while it looked around."""
    looking = re.compile(r"\.dist_convert-[0-9a-f]+")
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not looking.fullmatch(path.name)]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
