"""Starts ranks, and keeps what they print: forked ones, which are quick, and those of torchrun, as a user does."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.warm import IMPORTED, REPOSITORY, TIMEOUT_SECONDS, Process, Run

#: From torchrun's SIGTERM to its SIGKILL.
_GRACE_SECONDS = 30.0
#: More than one of several small jobs takes.
_JOB_SECONDS = 60.0


def environment(**more: str) -> dict[str, str]:
    """This process's environment for ranks: one thread each, this tree importable, no leftovers of a launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | more


def run_program(*arguments: str, module: str = "dist_convert", **env: str) -> Run:
    """Run a module in one process."""
    return Process(["-m", module, *arguments], environment(**env)).finish()


def start_ranks(
    stack: ExitStack, programs: Sequence[Sequence[str]], nodes: Sequence[Mapping[str, str]],
    imported: tuple[str, ...] = IMPORTED, *, exits: bool = False,
) -> list[Process]:  # fmt: skip
    """Fork ranks that find what torchrun would tell them, with a new store.

    Args:
        stack: what ends the ranks and the store.
        programs: of each rank, a module and its arguments.
        nodes: the environment of each node's ranks, but for what launchers set.
        imported, exits: see `Process`.
    """
    from torch.distributed import TCPStore  # benchmarks, which measure memory, start from here without torch

    ranks_each = len(programs) // len(nodes)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stack.callback(lambda: store)  # until then
    shared = {"WORLD_SIZE": str(len(programs)), "LOCAL_WORLD_SIZE": str(ranks_each), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = []
    for rank, program in enumerate(programs):
        node, local_rank = divmod(rank, ranks_each)
        own = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "GROUP_RANK": str(node)}
        how = {"seed": rank % 2, "exits": exits, "imported": imported}
        ranks.append(stack.enter_context(Process(["-m", *program], {**nodes[node], **shared, **own}, **how)))
    return ranks


def wait_as_torchrun(ranks: Sequence[Process]) -> None:
    """Wait for the ranks of a node; once one has failed, the others are told to end, and killed if they do not."""
    deadline, told_at = time.monotonic() + TIMEOUT_SECONDS, math.inf
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if told_at == math.inf and any(rank.poll() for rank in ranks):
            told_at = time.monotonic()
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
        if time.monotonic() > told_at + _GRACE_SECONDS:
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)


def run_ranks(ranks: int, *arguments: str, module: str = "dist_convert", env: Mapping[str, str] | None = None) -> Run:
    """Run a module on ranks with an environment; the exit code is that of the first that failed."""
    with ExitStack() as stack:
        started = start_ranks(stack, [[module, *arguments]] * ranks, [env or environment()], exits=True)
        wait_as_torchrun(started)
        return _together([rank.finish() for rank in started])


def on_two_nodes(ranks_each: int, *job: str, env: Sequence[Mapping[str, str]] = ({}, {})) -> list[Run]:
    """The ranks of two nodes, both of them this machine; `env` is what each of them sets."""
    with ExitStack() as stack:
        nodes = [environment(**more) for more in env]
        ranks = start_ranks(stack, [["dist_convert", *job]] * (2 * ranks_each), nodes, exits=True)
        found = [rank.finish() for rank in ranks]
    return [_together(found[:ranks_each]), _together(found[ranks_each:])]


def _together(runs: Sequence[Run]) -> Run:
    codes = [run.returncode for run in runs if run.returncode]
    codes.sort(key=lambda code: code == -signal.SIGTERM)  # one that was told to end failed after the one that did
    return Run(codes[0] if codes else 0, "".join(run.stdout for run in runs), "".join(run.stderr for run in runs))


def command(
    ranks: int, *arguments: str, module: str = "dist_convert", nodes: Sequence[str] = ("--standalone",)
) -> list[str]:
    """The command line of a torchrun of `ranks` ranks on this machine.

    Args:
        ranks: processes to start.
        arguments: of the module.
        module: that every rank runs.
        nodes: torchrun's own flags about machines and their meeting point.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", *nodes, "--nproc-per-node", str(ranks)]
    return [*torchrun, "-m", module, *arguments]


def torchrun(ranks: int, *arguments: str, module: str = "dist_convert") -> Run:
    """Run a module on `ranks` ranks of a torchrun and wait for all of them.

    Raises:
        subprocess.TimeoutExpired: it hangs.
    """
    line = command(ranks, *arguments, module=module)
    done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment(), check=False)
    return Run(done.returncode, done.stdout, done.stderr)


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def run_together(
    commands: Sequence[Sequence[str]],
    environments: Sequence[dict[str, str]],
    on_first_end: Callable[[], None] = lambda: None,
) -> list[Run]:
    """Run commands at the same time; stops all of them where one hangs.

    Args:
        commands: each with its arguments.
        environments: of each.
        on_first_end: called when the first of them has ended.
    """
    running = [
        subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line, env in zip(commands, environments, strict=True)
    ]
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while all(process.poll() is None for process in running) and time.monotonic() < deadline:
            time.sleep(0.1)
        on_first_end()
        printed = [process.communicate(timeout=TIMEOUT_SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    return [Run(process.returncode, *texts) for process, texts in zip(running, printed, strict=True)]


def flags(source: Path | str, target: Path, *more: str) -> list[str]:
    """The flags of a conversion on the CPU that keeps dtypes."""
    kept = ["--device", "cpu", "--target-params-dtype", "keep"]
    return ["megatron-to-hf", "--load-path", str(source), "--save-path", str(target), *kept, *more]


@dataclass(frozen=True)
class Answer:
    """What became of one of several jobs.

    Attributes:
        exit_codes: of the ranks; negative for the signal that ended one.
        stdout, stderr: of the ranks.
        outcomes: what each rank returned, None where it failed.
        collectives: for each rank, every call as (operation, dtypes, elements of each tensor).
    """

    exit_codes: list[int]
    stdout: list[str]
    stderr: list[str]
    outcomes: list[dict[str, Any] | None]
    collectives: list[list[tuple[str, str, list[int]]]]

    @property
    def outcome(self) -> dict[str, Any]:
        """Rank 0's outcome, after a job that must have worked."""
        assert not any(self.exit_codes), (self.exit_codes, *self.stderr)
        assert self.outcomes[0] is not None
        return self.outcomes[0]


def run_jobs(
    ranks: int, jobs: Mapping[str, Sequence[str]], scratch: Path, env: Mapping[str, str] | None = None
) -> dict[str, Answer]:
    """Run several command lines one after the other, and record what they do; no rank is told of another's end.

    Args:
        ranks: of each.
        jobs: name -> arguments of `dist_convert`, in which {RANK} stands for the rank's number.
        scratch: directory for what ranks record.
        env: what the ranks find in their environment besides.
    """
    found = environment(**(env or {}))
    return {name: _run_job(ranks, job, scratch / f"{n}", found) for n, (name, job) in enumerate(jobs.items())}


def _run_job(ranks: int, job: Sequence[str], record: Path, env: Mapping[str, str]) -> Answer:
    files = [record.with_name(f"{record.name}-{rank}.json") for rank in range(ranks)]
    programs = [
        ["tests.distributed.programs.recorded_rank", str(file), *(flag.replace("{RANK}", str(rank)) for flag in job)]
        for rank, file in enumerate(files)
    ]
    with ExitStack() as stack:
        runs = [rank.finish(_JOB_SECONDS) for rank in start_ranks(stack, programs, [env])]
    records = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    return Answer(
        [run.returncode for run in runs],
        [run.stdout for run in runs],
        [run.stderr for run in runs],
        [found.get("outcome") for found in records],
        [found.get("seen", []) for found in records],
    )


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a directory."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}
