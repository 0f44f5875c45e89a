"""Starts ranks that end at chosen moments, many times over: `interrupted_runs` reads them from standard input.

Every run forks its ranks from this process, which has imported torch once. A moment is the
n-th call of a rank to the operating system that reads a source, or writes, renames, syncs or removes anything; there
the rank signals itself, or all ranks. Blocks and steps are small, so that small checkpoints have many. What became of a
run is printed as a line of JSON: exit codes, calls and output of each rank, and the seconds it took.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import math
import mmap
import os
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dist_convert.plan.copies

dist_convert.plan.copies.BLOCK_BYTES = 4096

import dist_convert.plan.plan  # noqa: E402  all others take the sizes from these two

dist_convert.plan.plan.STEP_BYTES = 16384

import dist_convert.__main__  # noqa: E402
import dist_convert.move.convert  # noqa: E402  imported once, before forking
from tests.distributed.programs.forked_store import end_store, fork_store  # noqa: E402

TIMEOUT_SECONDS = 60.0
#: What a run is by default; each of the nodes has as many ranks. From the end of one rank to the SIGTERM of the others
#: `patience_seconds` pass. `before` is a module beside this one, which prepares each rank, and arguments.
DEFAULTS: dict[str, Any] = {
    "ranks": 1, "nodes": 1, "rank": -1, "moment": 0, "signals": [], "all": False, "pause_seconds": 0.0,
    "patience_seconds": 0.5, "before": [],
}  # fmt: skip
CALLS = ("preadv", "pwrite", "write", "fsync", "fdatasync", "rename", "mkdir", "unlink", "rmdir", "ftruncate")


class Counts:
    """What each rank has done, in memory that outlives it: two numbers a rank, calls and bytes of tensors written."""

    def __init__(self, ranks: int) -> None:
        self._shared = mmap.mmap(-1, 16 * ranks)
        self._lock = threading.Lock()

    def of_rank(self, rank: int) -> tuple[int, int]:
        calls, written_bytes = struct.unpack_from("<2Q", self._shared, 16 * rank)
        return calls, written_bytes

    def add(self, rank: int, calls: int, written_bytes: int) -> int:
        """Count on; returns the number of calls."""
        with self._lock:
            before, before_bytes = self.of_rank(rank)
            struct.pack_into("<2Q", self._shared, 16 * rank, before + calls, before_bytes + written_bytes)
        return before + calls


def count_calls(counts: Counts, rank: int, moment: int, act: Callable[[], None]) -> None:
    """From now on, count this process's calls, and act at one of them."""

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            only_asks = function is preadv and len(args) > 3  # whether bytes are in memory
            if not only_asks and counts.add(rank, 1, 0) == moment:
                act()
            answer = function(*args, **kwargs)
            if function is pwrite and isinstance(args[1], memoryview):  # all else is written from bytes
                counts.add(rank, 0, answer)
            return answer

        return call

    preadv, pwrite = os.preadv, os.pwrite
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def act_of(run: Mapping[str, Any]) -> Callable[[], None]:
    """What happens at the moment: signals to this rank or, as when a machine ends, to all."""
    numbers = [getattr(signal, name) for name in run["signals"]]

    def act() -> None:
        time.sleep(run["pause_seconds"])
        for number in numbers:
            os.killpg(0, number) if run["all"] else os.kill(os.getpid(), number)

    return act


def run_rank(run: Mapping[str, Any], rank: int, port: int, answers: Path, counts: Counts) -> int:
    """One rank, in its forked process."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(answers / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), stream)
    node, local_rank = divmod(rank, run["ranks"] // run["nodes"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "GROUP_RANK": str(node)}
    os.environ |= {"WORLD_SIZE": str(run["ranks"]), "LOCAL_WORLD_SIZE": str(run["ranks"] // run["nodes"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS - 5)
    for module in run["before"][:1]:
        importlib.import_module(f"tests.distributed.programs.{module}").prepare(*run["before"][1:])
    count_calls(counts, rank, run["moment"] if rank == run["rank"] else 0, act_of(run))
    return dist_convert.__main__.main(run["flags"])


def fork_rank(run: Mapping[str, Any], rank: int, port: int, answers: Path, counts: Counts, group: int) -> int:
    """Start a rank; returns its process id."""
    child = os.fork()
    if child:
        os.setpgid(child, group or child)
        return child
    code = 70
    try:
        os.setpgid(0, group)
        code = run_rank(run, rank, port, answers, counts)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(children: Sequence[int], patience_seconds: float) -> list[int]:
    """The exit codes of processes. As torchrun does, once one has failed the others are told to end.

    What has not ended after `TIMEOUT_SECONDS` is killed; a while before it prints where it hangs.
    """
    codes: dict[int, int] = {}
    told_at, is_told = math.inf, False
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(codes) < len(children):
        for child in children:
            ended, status = os.waitpid(child, os.WNOHANG) if child not in codes else (0, 0)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        left = [child for child in children if child not in codes]
        if any(codes.values()) and told_at == math.inf:
            told_at = now + patience_seconds
        if now >= told_at and not is_told:
            send(left, signal.SIGTERM)
            is_told = True
        if (is_stopped(left) and now > told_at + 2.0) or now > deadline:
            send(left, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def send(children: Sequence[int], number: int) -> None:
    """Signal processes of ours, none of which has been waited for."""
    for child in children:
        os.kill(child, number)


def is_stopped(children: Sequence[int]) -> bool:
    """Whether a signal has stopped all of some processes."""
    states = [Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] for child in children]
    return bool(states) and set(states) == {"T"}


def do_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """Fork the ranks of a run, wait for them, and tell what became of them."""
    counts = Counts(run["ranks"])
    server, port = fork_store()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        answers = Path(name)
        children: list[int] = []
        for rank in range(run["ranks"]):
            children.append(fork_rank(run, rank, port, answers, counts, children[0] if children else 0))
        codes = wait_for(children, run["patience_seconds"])
        end_store(server)
        found = [counts.of_rank(rank) for rank in range(run["ranks"])]
        return {
            "exit_codes": codes,
            "calls": [calls for calls, _ in found],
            "written_bytes": sum(written_bytes for _, written_bytes in found),
            "stdout": [(answers / f"stdout-{rank}").read_text() for rank in range(run["ranks"])],
            "stderr": [(answers / f"stderr-{rank}").read_text() for rank in range(run["ranks"])],
            "seconds": time.monotonic() - started,
        }


def main() -> None:
    """Do runs as they are asked for, a line of JSON each."""
    for line in sys.stdin:
        print(json.dumps(do_run(DEFAULTS | json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
