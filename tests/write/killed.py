"""Kills conversions at chosen moments, each of which is followed by the same command: `python -m tests.write.killed`.

A moment is the n-th call to the operating system that opens, writes, renames, forces to the disk or removes something,
whatever thread it comes from: there the process gets a SIGKILL. All conversions are forked from this process. The job
comes as JSON on the command line, and what became of each moment is printed as a line of JSON.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dist_convert.move.convert  # noqa: F401  imported once, before forking
from dist_convert.__main__ import main

CALLS = (
    "open", "write", "pwrite", "fsync", "fdatasync", "rename", "mkdir", "unlink", "rmdir", "ftruncate", "chmod",
)  # fmt: skip


def contents(root: Path) -> dict[str, str]:
    """Every file and directory below a root, with its mode and the digest of its content."""
    found = {}
    for path in sorted(root.rglob("*")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[path.relative_to(root).as_posix()] = f"{path.stat().st_mode:o} {digest}"
    return found


def in_a_fork(work: Callable[[], int]) -> tuple[int, str]:
    """The exit code of some work in a process of its own, negative for a signal, and what it prints."""
    answer, said = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = 70
        try:
            code = work()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(said)
    with os.fdopen(answer) as printed:
        text = printed.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def kill() -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return True


def counting(command: Sequence[str], moment: int, act: Callable[[], bool] = kill) -> int:
    """Run a command, and do something from a moment on until it is done, such as a kill; prints how many there were."""
    lock, made, done = threading.Lock(), [0], [False]
    os.fsync = os.fdatasync = lambda descriptor: None  # a kill loses nothing that the kernel has

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with lock:
                made[0] += 1
                if made[0] >= moment and not done[0]:
                    done[0] = act()
            return function(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    code = main(command)
    print(f"moments: {made[0]}")
    return code


def kill_and_go_on(command: Sequence[str], root: Path, old: Path | None, moment: int) -> dict[str, Any]:
    """What is below a root after a kill, after the same command, and what both said.

    Args:
        command: of `dist_convert`, whose target is below the root.
        root, old: where the target is made, and what is there before.
        moment: counted from 1; beyond the last one, nothing is killed.
    """
    shutil.rmtree(root, ignore_errors=True)
    if old is None:
        root.mkdir()
    else:
        shutil.copytree(old, root)
    killed, said = in_a_fork(lambda: counting(command, moment))
    left = contents(root)
    again, words = in_a_fork(lambda: main(command))
    moments = int(said.rpartition("moments: ")[2]) if not killed else moment
    return {
        "moment": moment, "moments": moments, "exit_codes": [killed, again], "left": left,
        "found": contents(root), "said": said + words,
    }  # fmt: skip


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    gc.freeze()
    for moment in job["moments"]:
        old = Path(job["old"]) if job["old"] else None
        print(json.dumps(kill_and_go_on(job["command"], Path(job["root"]), old, moment)), flush=True)
