"""Several hosts on this machine: network namespaces joined by a bridge, each with its own name and its own disk.

A host's disk is `ROOT/NAME`; every host sees its own at `ROOT/local`. The rest of the file system is shared. Needs root
and iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.launching import Run, command, environment, run_together

PORT = "29501"

#: In namespaces of mounts and of the host's name; then whatever is to run.
_ENTER = """
hostname "$1"; mount --bind "$2/$1" "$2/local"; mount --bind "$2/hosts" /etc/hosts; shift 2; exec "$@"
"""


@dataclass(frozen=True)
class Hosts:
    """Hosts that can reach each other by name. The first one's number is 0."""

    root: Path
    names: tuple[str, ...]

    def disk(self, number: int) -> Path:
        """A host's own disk, as it is seen from outside."""
        return self.root / self.names[number]

    @property
    def local(self) -> Path:
        """Where each host sees its own disk."""
        return self.root / "local"

    def connect(self, number: int) -> None:
        """Take a host's network up again."""
        _ip(f"-n {self.names[number]} link set eth0 up")

    def end(self, number: int) -> None:
        """Kill all that runs on a host."""
        found = subprocess.run(["ip", "netns", "pids", self.names[number]], capture_output=True, text=True, check=True)
        for process in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def torchrun(
        self, *arguments: str, module: str = "dist_convert", on_first_end: Callable[[], None] = lambda: None
    ) -> list[Run]:
        """Run a module with one rank on each host, by static rendezvous at the first, until all have ended.

        Args:
            arguments: of the module.
            module: that every rank runs.
            on_first_end: called when the first host's or another's torchrun has ended.
        """
        meeting = ("--nnodes", str(len(self.names)), "--master-addr", self.names[0], "--master-port", PORT)
        commands = [
            self._on(name, *command(1, *arguments, module=module, nodes=(*meeting, "--node-rank", str(number))))
            for number, name in enumerate(self.names)
        ]
        return run_together(commands, [environment(GLOO_SOCKET_IFNAME="eth0")] * len(commands), on_first_end)

    def _on(self, name: str, *words: str) -> list[str]:
        enter = ["unshare", "--mount", "--uts", "--propagation", "private", "bash", "-euc", _ENTER, "enter"]
        return ["ip", "netns", "exec", name, *enter, name, str(self.root), *words]


def why_not() -> str | None:
    """Why there can be no hosts here, or None."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return "network namespaces need root, iproute2 and unshare"
    made = subprocess.run(["ip", "netns", "add", f"dc{os.getpid()}"], capture_output=True)
    if made.returncode:
        return "network namespaces cannot be made here"
    _ip(f"netns del dc{os.getpid()}")
    return None


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


@contextmanager
def hosts(root: Path, count: int) -> Iterator[Hosts]:
    """Hosts that are up until the context ends."""
    switch, names = f"dc{os.getpid()}sw", tuple(f"dc{os.getpid()}h{number}" for number in range(count))
    made: list[str] = []
    try:
        for name in (switch, *names):
            _ip(f"netns add {name}")
            made.append(name)
        _ip(f"-n {switch} link add name bridge type bridge")
        _ip(f"-n {switch} link set bridge up")
        for number, name in enumerate(names):
            _ip(f"-n {name} link add name eth0 type veth peer name p{number} netns {switch}")
            _ip(f"-n {switch} link set p{number} master bridge up")
            _ip(f"-n {name} addr add 10.99.0.{number + 1}/24 dev eth0")
            _ip(f"-n {name} link set eth0 up")
            _ip(f"-n {name} link set lo up")
            (root / name).mkdir()
        (root / "local").mkdir()
        lines = ["127.0.0.1 localhost", *(f"10.99.0.{number + 1} {name}" for number, name in enumerate(names))]
        (root / "hosts").write_text("\n".join(lines) + "\n")
        yield Hosts(root, names)
    finally:
        for name in made:
            _ip(f"netns del {name}")
