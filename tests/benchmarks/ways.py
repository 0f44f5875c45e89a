"""The ways to move a model's bytes that are timed against each other, each as the command that a user would give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tests.benchmarks.machine import COPY
from tests.benchmarks.timed_rank import COPY_FIRST, copy_and_remove
from tests.distributed.launching import command, environment


@dataclass(frozen=True)
class Sample:
    """One run of a way.

    Attributes:
        data_seconds: from the first byte moved to the last byte written.
        synced_seconds: until the files are on the disk, too.
        whole_seconds: of the whole command, the start of its interpreters included.
        data_cpu_seconds: user and system time of all processes in the data phase.
        whole_cpu_seconds: the same of the whole command.
        gathered_bytes: that all ranks together received from others, over gloo.
        peak_bytes: resident memory of each rank; empty where it is not known.
    """

    data_seconds: float
    synced_seconds: float
    whole_seconds: float
    data_cpu_seconds: float
    whole_cpu_seconds: float
    gathered_bytes: int
    peak_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Way:
    """One way of moving a model's bytes.

    Attributes:
        tool: "cp", "ours", "torchrun" (ours, with ranks that torchrun starts instead of `--ranks`), "gloo" (ranks send
            one another what ours do, and no more) or "transformers" (which loads the Hugging Face model and saves it).
        source: "plain", "optimizer" (the same weights beside an optimizer's state) or "fp32" (cast to bf16).
        placement: of ours, and of whose messages gloo sends.
        ranks: processes.
        read_bytes, written_bytes: of weights. Every expert parallel rank's file of a Megatron checkpoint has a copy
            of what is not an expert's; one of them is read, all are written. Of gloo what is not gathered counts, too.
        file_bytes: of the files that are read, whatever else is in them.
    """

    tool: str
    source: str
    placement: str
    ranks: int
    read_bytes: int
    written_bytes: int
    file_bytes: int

    @property
    def is_reference(self) -> bool:
        """Whether other ways are compared with it."""
        return self.source == "plain" and (self.tool == "cp" or (self.tool == "ours" and self.placement == "direct"))

    @property
    def moved_bytes(self) -> int:
        """What GB/s are counted by: casts write less than they read, copies for expert ranks are written only."""
        return max(self.read_bytes, self.written_bytes)


@dataclass(frozen=True)
class Ready:
    """A way that can be run: it makes `target`, which is removed before the next run.

    Attributes:
        warm: brings what the way reads into the page cache, as it may have left it since the last run.
    """

    way: Way
    target: Path
    run: Callable[[], Sample]
    warm: Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """A command that has ended well."""

    seconds: float
    cpu_seconds: float


def run_command(line: Sequence[str], environment: Mapping[str, str] | None = None) -> Ended:
    """Run a command, and count the CPU seconds of all processes that it started and waited for.

    Args:
        line: the command.
        environment: of its process; None for this one's.
    """
    with tempfile.TemporaryFile() as printed:
        began = time.monotonic()
        process = subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        if process.returncode:
            printed.seek(0)
            sys.exit(f"{' '.join(line)}\n{printed.read().decode(errors='replace')}\nexit code {process.returncode}")
    return Ended(seconds, usage.ru_utime + usage.ru_stime)


def read_through(directory: Path) -> None:
    """Read all files of a directory, so that the page cache has them."""
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(8 << 20):
                    pass


def copy(source: Path, target: Path) -> Sample:
    """Copy a directory by one `cp`, then have `sync` put the copied files, and no others, on the disk."""
    copy_and_remove(source, target)
    copied = run_command([*COPY, str(source), str(target)])
    both_seconds = copied.seconds + _sync(target).seconds
    return Sample(copied.seconds, both_seconds, copied.seconds, copied.cpu_seconds, copied.cpu_seconds, 0, ())


def _sync(directory: Path) -> Ended:
    return run_command(["sync", *(str(file) for file in sorted(directory.rglob("*")) if file.is_file())])


def convert(
    ranks: int, flags: Sequence[str], copied: tuple[Path, Path] | None = None, *, by_torchrun: bool = False
) -> Sample:
    """Convert, with `--ranks`.

    Args:
        ranks: processes.
        flags: of the command.
        copied: what is copied, where to, and removed there, directly before the data phase; untimed.
        by_torchrun: not so, but with ranks that torchrun starts.
    """
    with tempfile.TemporaryDirectory() as report:
        if copied is not None:
            (Path(report) / COPY_FIRST).write_text(json.dumps([str(path) for path in copied]))
        if by_torchrun:
            whole = _launch(ranks, "timed_rank", report, *flags)
        else:
            whole = _launch(1, "timed_rank", report, *flags, "--ranks", str(ranks))
        return data_phase(Path(report), ranks, whole)


@cache
def _messages_of(ranks: int, flags: tuple[str, ...]) -> str:
    """What passes between the ranks of a conversion: JSON, as `gloo_alone` reads it."""
    with tempfile.TemporaryDirectory() as report:
        _launch(ranks, "timed_rank", report, *flags, "--dry-run")
        records = [json.loads((Path(report) / f"rank{rank}.json").read_text()) for rank in range(ranks)]
        return json.dumps([record["messages"] for record in records])


def pass_messages(ranks: int, flags: tuple[str, ...], target: Path) -> Sample:
    """Have ranks send each other what those of a conversion with these flags do."""
    target.mkdir()
    (target / "messages.json").write_text(_messages_of(ranks, flags))
    return data_phase(target, ranks, _launch(ranks, "gloo_alone", str(target)))


def load_and_save(source: Path, target: Path) -> Sample:
    """Load a Hugging Face model by transformers, save it, then have `sync` put the files on the disk."""
    with tempfile.TemporaryDirectory() as report:
        whole = _launch(1, "transformers_alone", report, str(source), str(target))
        sample = data_phase(Path(report), 1, whole)
    return replace(sample, synced_seconds=sample.data_seconds + _sync(target).seconds)


def _launch(ranks: int, module: str, *arguments: str) -> Ended:
    """Run a module of this directory: one rank alone, several under torchrun."""
    if ranks == 1:
        return run_command([sys.executable, "-m", _full_name(module), *arguments], _environment())
    return run_command(command(ranks, *arguments, module=_full_name(module)), _environment())


def _full_name(module: str) -> str:
    return f"tests.benchmarks.{module}"


def _environment() -> dict[str, str]:
    env = environment()
    del env["OMP_NUM_THREADS"]  # the threads that a user gets
    return env


def data_phase(report: Path, ranks: int, whole: Ended) -> Sample:
    """What ranks took, from what `timed_rank` or a program like it put down."""
    records = [json.loads((report / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    began = min(record["moved"][0] for record in records)
    ended = max(record["moved"][1] for record in records)
    copying_seconds, copying_cpu_seconds = records[0].get("copying", (0.0, 0.0))
    return Sample(
        ended - began,
        max((record["synced"][1] for record in records if "synced" in record), default=ended) - began,
        whole.seconds - copying_seconds,
        sum(record["moved_cpu_seconds"] for record in records),
        whole.cpu_seconds - copying_cpu_seconds,
        sum(record["gathered_bytes"] for record in records),
        tuple(record["peak_bytes"] for record in records),
    )
