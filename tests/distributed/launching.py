"""Starts ranks with torchrun, as a user does, and keeps what they print."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]

#: A run that takes longer than this hangs.
TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Run:
    """A finished torchrun, all of its ranks' output together."""

    returncode: int
    stdout: str
    stderr: str


def environment(**more: str) -> dict[str, str]:
    """This process's environment for torchrun: one thread a rank, this tree importable, no leftovers of a launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | more


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


def torchrun(ranks: int, *arguments: str, module: str = "dist_convert", env: Mapping[str, str] | None = None) -> Run:
    """Run a module on `ranks` ranks and wait for all of them.

    Raises:
        subprocess.TimeoutExpired: it hangs.
    """
    done = subprocess.run(
        command(ranks, *arguments, module=module),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment(**(env or {})),
        check=False,
    )
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


def on_two_nodes(ranks_each: int, *job: str, env: Sequence[Mapping[str, str]] = ({}, {})) -> list[Run]:
    """The two torchruns of a run on two machines, both of them this one; `env` is what each of them sets."""
    meeting = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", free_port())
    commands = [command(ranks_each, *job, nodes=(*meeting, "--node-rank", node)) for node in "01"]
    return run_together(commands, [environment(**more) for more in env])


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
    """Run several command lines one after the other within one torchrun, which is quicker than one for each.

    Args:
        ranks: of the torchrun.
        jobs: name -> arguments of `dist_convert`.
        scratch: directory for what is passed to and from the ranks.
        env: what the ranks find in their environment besides.
    """
    (scratch / "jobs.json").write_text(json.dumps(list(jobs.values())))
    run = torchrun(
        ranks, str(scratch / "jobs.json"), str(scratch), module="tests.distributed.programs.many_jobs", env=env
    )
    assert run.returncode == 0, run.stderr
    return {name: _answer(scratch, number, ranks) for number, name in enumerate(jobs)}


def _answer(scratch: Path, number: int, ranks: int) -> Answer:
    files = [scratch / f"{number}-{rank}" for rank in range(ranks)]
    records = [json.loads(file.with_suffix(".json").read_text()) for file in files]
    return Answer(
        [record["exit_code"] for record in records],
        [file.with_suffix(".stdout").read_text() for file in files],
        [file.with_suffix(".stderr").read_text() for file in files],
        [record.get("outcome") for record in records],
        [record.get("seen", []) for record in records],
    )


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a directory."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}
