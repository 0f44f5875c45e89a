"""Programs that start in milliseconds: forked from a process that has imported torch, one for each Python in use.

What they do is what `python -m MODULE` does, in a session of their own, but for the import of torch. Modules that read
their environment when they are imported, as huggingface_hub does, are imported by each program itself.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

#: A program that takes longer hangs.
TIMEOUT_SECONDS = 300.0
#: All that a conversion or comparison imports before it knows what it is to do.
IMPORTED = ("dist_convert.move.convert", "dist_convert.compare.verify", "torch.distributed")


@dataclass(frozen=True)
class Run:
    """A finished program, or several with what they printed one after the other."""

    returncode: int
    stdout: str
    stderr: str


class Process:
    """A program under way, with the session's leader `pid`; as a context it is killed at the end.

    Args:
        words: of Python's command line: `-m MODULE` or `-c CODE`, and arguments.
        environment: all of it.
        directory: where it runs.
        python: which Python's packages it has.
        seed: of its hashes, 0 or 1. Ranks must agree whatever theirs are.
        exits: by Python's own exit, which takes its time, and not at once.
        imported: what it is forked with.
        entered: its standard input.
    """

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str], directory: Path = REPOSITORY,
        python: str = sys.executable, seed: int = 0,
        exits: bool = False, imported: tuple[str, ...] = IMPORTED, entered: str = "",
    ) -> None:  # fmt: skip
        request = {"words": list(words), "environment": dict(environment), "directory": str(directory), "exits": exits}
        self.returncode: int | None = None
        self._printed = [tempfile.TemporaryFile("w+b") for _ in ("stdout", "stderr")]  # noqa: SIM115
        self._answer, theirs = os.pipe()
        with tempfile.TemporaryFile("w+") as given:
            given.write(entered)
            given.seek(0)
            descriptors = [file.fileno() for file in (given, *self._printed)] + [theirs]
            socket.send_fds(_server(python, seed, imported), [json.dumps(request).encode()], descriptors)
        os.close(theirs)
        self.pid = int(self._line(TIMEOUT_SECONDS))

    def _line(self, timeout_seconds: float) -> str:
        """What the server says next, "" if it does not in time."""
        if not select.select([self._answer], [], [], timeout_seconds)[0]:
            return ""
        line = b""
        while not line.endswith(b"\n"):
            read = os.read(self._answer, 1)
            assert read, "the server of warm programs has ended"
            line += read
        return line.decode()

    def poll(self, timeout_seconds: float = 0.0) -> int | None:
        """The exit code once it has ended, negative for a signal; waits for it so long."""
        if self.returncode is None and (line := self._line(timeout_seconds)):
            self.returncode = int(line)
            os.close(self._answer)
        return self.returncode

    def finish(self, timeout_seconds: float = TIMEOUT_SECONDS) -> Run:
        """Wait until it has ended.

        Raises:
            AssertionError: it hangs; it is killed, and shows where.
        """
        if self.poll(timeout_seconds) is None:
            self.send_signal(signal.SIGABRT)
            time.sleep(1)
            self.kill()
            raise AssertionError(f"hangs after {timeout_seconds} s:\n{self.printed[1]}")
        assert self.returncode is not None
        return Run(self.returncode, *self.printed)

    @property
    def printed(self) -> tuple[str, str]:
        """Standard output and error, as far as there is any yet."""
        texts = []
        for file in self._printed:
            size_bytes = os.fstat(file.fileno()).st_size
            texts.append(os.pread(file.fileno(), size_bytes, 0).decode(errors="replace"))
        return texts[0], texts[1]

    def printed_line(self) -> str:
        """The first line of standard output, once it is there."""
        while "\n" not in self.printed[0]:
            assert self.poll(0.01) is None, self.printed
        return self.printed[0].splitlines(keepends=True)[0]

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ends at this moment
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, if it is still there, and wait."""
        self.send_signal(signal.SIGKILL)
        self.poll(TIMEOUT_SECONDS)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            self.kill()


@functools.cache
def _server(python: str, seed: int, imported: tuple[str, ...]) -> socket.socket:
    """Where to ask for programs; the process that forks them ends with this one at the latest."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    found = {"PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": str(seed)}
    found |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [python, "-X", "faulthandler", "-m", "tests.warm_server", str(theirs.fileno()), *imported],
        pass_fds=[theirs.fileno()], cwd=REPOSITORY, env=os.environ | found, start_new_session=True,
    )  # fmt: skip
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours
