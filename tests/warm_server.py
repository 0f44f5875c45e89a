"""Forks programs from a process that has imported what takes each of them seconds: `warm_server DESCRIPTOR MODULE...`.

A directory among the modules is where those after it are looked for first.

Every message on the socket is a command line, environment and directory as JSON, with four descriptors: standard input,
output and error, and a pipe that gets the program's process id and, when it has ended, its exit code. A program has a
session of its own. It ends at once, or by Python's own exit with all that takes, a third of a second. When the socket
is closed, all are killed.

It needs nothing but the standard library, so that the Python of any environment can run it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork for each request; returns it in the program's process, and None here when nobody can ask any more."""
    running: dict[int, tuple[int, int]] = {}  # a descriptor of each process -> its number, and the pipe for its end
    waiting = select.poll()
    waiting.register(control, select.POLLIN)
    while True:
        for ready, _ in waiting.poll():
            if ready != control.fileno():
                child, answer = running.pop(ready)
                waiting.unregister(ready)
                os.close(ready)
                _tell(answer, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
                os.close(answer)
                continue
            message, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 4)
            if not message:
                for child, _ in running.values():
                    os.kill(child, signal.SIGKILL)
                return None
            *streams, answer = descriptors
            child = os.fork()
            if not child:
                control.close()
                for descriptor in (answer, *running, *(pipe for _, pipe in running.values())):
                    os.close(descriptor)
                _take(streams)
                return dict(json.loads(message))
            for descriptor in streams:
                os.close(descriptor)
            _tell(answer, child)
            process = os.pidfd_open(child)
            running[process] = child, answer
            waiting.register(process, select.POLLIN)


def _tell(pipe: int, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody waits for it
        os.write(pipe, f"{number}\n".encode())


def _take(streams: Sequence[int]) -> None:
    """Make descriptors the standard streams of a session of its own."""
    os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)


def become(request: dict[str, Any]) -> None:
    """Be the program that was asked for: `-m MODULE` or `-c CODE`, and arguments."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    kind, program, *arguments = request["words"]
    sys.argv = [kind, *arguments]
    code: object = 0
    try:
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        if request["exits"]:
            raise
        code = error.code or 0
    except Exception:
        if request["exits"]:
            raise
        traceback.print_exc()
        code = 1
    if not request["exits"]:
        if not isinstance(code, int):
            print(code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def main() -> None:
    """Import the modules, and serve."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor, *modules = sys.argv[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules:
            if os.sep in module:
                sys.path.insert(0, module)
            else:
                importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads, and keep what they have locked"
    gc.freeze()
    if request := serve(socket.socket(fileno=int(descriptor))):
        become(request)


if __name__ == "__main__":
    main()
