"""Every rank's program for several conversions in one torchrun: `many_jobs JOBS.json DIRECTORY`.

Each job is a command line of `dist_convert` in which {RANK} stands for the rank's number in any flag. It runs in a
process of its own that is forked from this one, and with a store of its own: torch is imported only once, and a job
that fails ends like any other. What a job's rank prints goes to `DIRECTORY/NUMBER-RANK.stdout` and `.stderr`, the rest
to `.json`: the exit code and, where it converted, the outcome and the collectives that it took part in.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore

import dist_convert.api
from dist_convert.__main__ import main as dist_convert_main
from dist_convert.move.report import Report, report_details
from dist_convert.options import Options
from dist_convert.ranks.channel import Channel
from dist_convert.ranks.collectives import World
from tests.distributed.programs.forked_store import end_store, fork_store

#: A job that takes longer hangs; its process is killed by SIGALRM.
TIMEOUT_SECONDS = 45

COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather",
    "gather_object", "irecv", "isend", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter",
    "scatter_object_list", "send",
)  # fmt: skip


def record_collectives() -> list[tuple[str, str, list[int]]]:
    """From now on, list every call of a collective in `torch.distributed`: name, dtypes and sizes of its tensors."""
    seen: list[tuple[str, str, list[int]]] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            dtypes = "+".join(sorted({str(tensor.dtype) for tensor in tensors}))
            seen.append((name, dtypes, sorted(tensor.numel() for tensor in tensors)))
            return function(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, recorded(name, getattr(dist, name)))
    return seen


def run_job(flags: list[str], record: Path) -> int:
    """Run one command line in this process; returns its exit code. `record` gets the outcome."""
    convert = dist_convert.api.convert

    def convert_recorded(job: Options, world: World, channel: Channel) -> Report:
        seen = record_collectives()
        outcome = convert(job, world, channel)
        record.write_text(json.dumps({"outcome": report_details(outcome), "seen": seen}))
        return outcome

    dist_convert.api.convert = convert_recorded
    return dist_convert_main([flag.replace("{RANK}", os.environ["RANK"]) for flag in flags])


def serve_store(number: int, agent: Store) -> int | None:
    """Rank 0 has a process serve one job's store and tells the others its port, which goes into the environment."""
    serving = None
    if os.environ["RANK"] == "0":
        serving, port = fork_store()
        agent.set(f"port of {number}", str(port))
    os.environ["MASTER_PORT"] = agent.get(f"port of {number}").decode()
    return serving


def run_forked(flags: list[str], number: int, directory: Path) -> None:
    """Run one command line in a forked process and write down what became of it."""
    files = directory / f"{number}-{os.environ['RANK']}"
    child = os.fork()
    if not child:
        code = 70
        try:
            signal.alarm(TIMEOUT_SECONDS)
            for descriptor, suffix in ((1, ".stdout"), (2, ".stderr")):
                os.dup2(os.open(files.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            faulthandler.dump_traceback_later(TIMEOUT_SECONDS - 5)  # to its stderr, of all threads
            code = run_job(flags, files.with_suffix(".record"))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    answer = {"exit_code": os.waitstatus_to_exitcode(status)}
    record = files.with_suffix(".record")
    files.with_suffix(".json").write_text(
        json.dumps(answer | (json.loads(record.read_text()) if record.exists() else {}))
    )


def main(asked: Path, directory: Path) -> None:
    """Run every job."""
    port = int(os.environ["MASTER_PORT"])
    agent = TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=timedelta(seconds=300))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for number, flags in enumerate(json.loads(asked.read_text())):
        serving = serve_store(number, agent)
        run_forked(flags, number, directory)
        agent.add(f"done with {number}", 1)
        while serving is not None and agent.add(f"done with {number}", 0) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.01)
        if serving is not None:
            end_store(serving)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
