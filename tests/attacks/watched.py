"""Runs command lines in children that are watched: every file they open, program they start, host they call.

As a program it imports what a conversion needs, then forks a child for each line of JSON (a list of words) that it
reads, and prints a line of JSON on what became of it. Python's own audit events are the witness: no code of ours can do
these things past them.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
#: More than any hostile input of a few megabytes may cost beyond a conversion of that size.
MOST_MEMORY_BYTES, MOST_SECONDS = 1 << 30, 60
EVENTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "socket.bind",
          "pty.spawn", "os.chmod", "os.symlink", "os.link")  # fmt: skip
#: Where Python, its packages and the kernel's view of this process are.
OWN = (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *sys.path[1:], "/proc/", "/sys/", "/dev/null")


@dataclass(frozen=True)
class Seen:
    """What a watched command did.

    Attributes:
        exit_code: negative for the signal that ended it.
        printed: on both streams.
        opened: files that are not Python's own, their links resolved.
        events: what else was done, such as `os.system`.
        peak_bytes: how much memory it took beyond what the program had before.
        seconds: that it took.
    """

    exit_code: int
    printed: str
    opened: list[str]
    events: list[str]
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Watcher:
    """The program that forks."""

    process: subprocess.Popen[str]

    def run(self, *words: str) -> Seen:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        return Seen(**json.loads(self.process.stdout.readline()))


@contextlib.contextmanager
def watcher() -> Iterator[Watcher]:
    program = [sys.executable, "-m", "tests.attacks.watched"]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
    ) as process:  # fmt: skip
        yield Watcher(process)
        assert process.stdin is not None
        process.stdin.close()


def memory_bytes(field: str) -> int:
    """A field of this process's status, such as its peak resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def watch(words: list[str], answer: Path) -> int:
    """In the child: run a command line and note what it does."""
    from dist_convert.__main__ import main

    os.dup2(os.open(answer / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    before_bytes = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    space_bytes = memory_bytes("VmSize") + 2 * MOST_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (space_bytes, space_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
    signal.alarm(MOST_SECONDS)  # ends what waits for a file that never answers
    opened: set[str] = set()
    events: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            opened.add(os.path.realpath(os.fsdecode(arguments[0])))
        elif event in EVENTS:
            events.append(f"{event} {arguments!r}")

    sys.addaudithook(hook)
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [name for name in sorted(opened) if not name.startswith(OWN)]
    seen = {"opened": kept, "events": list(events), "peak_bytes": memory_bytes("VmHWM") - before_bytes}
    (answer / "seen.json").write_text(json.dumps(seen))
    return code


def fork(words: list[str]) -> dict[str, Any]:
    """Watch a command line in a child; a child that was killed has seen nothing."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        answer = Path(name)
        child = os.fork()
        if not child:
            code = 70
            try:
                code = watch(words, answer)
            finally:
                os._exit(code)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen: dict[str, Any] = {"opened": [], "events": [], "peak_bytes": 0}
        if (answer / "seen.json").exists():
            seen = json.loads((answer / "seen.json").read_text())
        printed = (answer / "printed").read_text(errors="replace")
        return {"exit_code": exit_code, "printed": printed, "seconds": time.monotonic() - started, **seen}


def main() -> None:
    """Import what conversions import, and watch what is asked for."""
    import dist_convert.move.convert  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(fork(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
