"""Measures that the memory of a conversion follows its budget and not the model: `python tests/benchmarks/memory.py`.

A Llama checkpoint at TP4 x PP2 is made with a quarter of the layers, with half of them and whole. Each is converted to
Hugging Face by ranks that all see it (direct), and by ranks that see the files of some tensor ranks each (gather); the
result is converted back to the same grid in both placements. The worst rank's peak resident memory is compared with the
base, the peak of the same command with `--dry-run` (Python, torch, the headers, the plan): peak <= base + budget, and
peaks of one kind within 5% of each other, or the exit code is 1. Where this is root on Linux with memory control groups
(version 1), one more conversion in each direction runs in a group whose limit holds torchrun, all ranks and their page
cache together, and is far smaller than the model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dist_convert.records import human_bytes, parse_bytes
from tests.benchmarks.sources import GRIDS, grid_flags, hand_out, make_megatron, model_near, parse_grid, weights_bytes
from tests.distributed.launching import environment

GRID = parse_grid(GRIDS["llama"])
GROUPS = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True)
class Row:
    """One line of the table: a conversion and the worst rank's memory, in bytes."""

    layers: int
    weights_bytes: int
    direction: str
    placement: str
    base_bytes: int
    peak_bytes: int

    def text(self, budget_bytes: int) -> str:
        """The line."""
        cells = [self.weights_bytes, self.base_bytes, self.peak_bytes, self.peak_bytes - self.base_bytes]
        within = "yes" if self.is_within(budget_bytes) else "NO"
        return (
            f"{self.layers:6} {self.direction:14} {self.placement:9} "
            + " ".join(f"{human_bytes(c):>10}" for c in cells)
            + f"  {within}"
        )

    def is_within(self, budget_bytes: int) -> bool:
        """Whether the budget held."""
        return self.peak_bytes - self.base_bytes <= budget_bytes


def are_flat(rows: Sequence[Row]) -> bool:
    """Whether the peaks of each direction and placement stay within 5% of each other, whatever the number of layers."""
    peaks: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        peaks.setdefault((row.direction, row.placement), []).append(row.peak_bytes)
    return all(max(of_kind) <= 1.05 * min(of_kind) for of_kind in peaks.values())


def launch(ranks: int, report: Path, job: Sequence[str], group: Path | None = None) -> None:
    """Run a job under torchrun, in a control group if one is given. Its ranks write their peaks below `report`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    rank = ["-m", "tests.benchmarks.timed_rank", str(report)]

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(
        [*torchrun, *rank, *job],
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=enter,
        check=False,
    )
    if done.returncode:
        sys.exit(f"the conversion failed\n{done.stderr}")


def measure(ranks: int, job: Sequence[str], scratch: Path) -> int:
    """The peak resident memory of a job's worst rank."""
    report = Path(tempfile.mkdtemp(dir=scratch))
    launch(ranks, report, job)
    return max(int(json.loads(file.read_text())["peak_bytes"]) for file in report.iterdir())


def convert_in_group(ranks: int, job: Sequence[str], limit_bytes: int, scratch: Path) -> str:
    """Run a conversion whose processes may hold `limit_bytes` together, page cache included; what came of it."""
    if not os.access(GROUPS / "cgroup.procs", os.W_OK):
        return "no writable memory control groups (version 1) here: conversion within a limit skipped"
    group = GROUPS / f"dist-convert-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        launch(ranks, Path(tempfile.mkdtemp(dir=scratch)), job, group)
        most = int((group / "memory.max_usage_in_bytes").read_text())
        killed = next(line for line in (group / "memory.oom_control").read_text().splitlines() if "oom_kill " in line)
    finally:
        group.rmdir()
    return (
        f"finished in a control group of {human_bytes(limit_bytes)} for torchrun, {ranks} ranks and their page cache "
        f"(most used: {human_bytes(most)}, {killed.split()[1]} processes killed)"
    )


def jobs(source: Path, scratch: Path, ranks: int, budget_bytes: int) -> list[tuple[str, str, list[str]]]:
    """Direction, placement and flags of each conversion; the way back needs what the way there has made."""
    how = ["--overwrite", "--device", "cpu", "--max-memory-per-rank", str(budget_bytes), "--placement"]
    there = ["megatron-to-hf", "--save-path", str(scratch / "hf"), "--load-path"]
    back = ["hf-to-megatron", "--load-dir", str(scratch / "hf"), "--save-dir", str(scratch / "back")]
    back += grid_flags(GRID)
    (iteration,) = source.glob("iter_*")
    handed_out = hand_out(iteration, ranks, source / "handed-out")
    return [
        ("megatron-to-hf", "direct", [*there, str(source), *how, "direct"]),
        ("megatron-to-hf", "gather", [*there, str(handed_out), *how, "gather"]),
        ("hf-to-megatron", "direct", [*back, *how, "direct"]),
        ("hf-to-megatron", "gather", [*back, *how, "gather"]),
    ]


def main() -> int:
    """Measure, print the table; 1 if a peak exceeds base + budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-gb", type=float, default=8.0, help="of the largest model, in bf16 (default: 8)")
    parser.add_argument("--budget", type=parse_bytes, default="128MB", help="--max-memory-per-rank (default: 128MB)")
    parser.add_argument("--ranks", type=int, default=2, choices=range(1, GRID.tensor + 1), help="(default: 2)")
    parser.add_argument("--limit", type=parse_bytes, default="1GB", help="of the control group (default: 1GB)")
    parser.add_argument("--with-optimizer", action="store_true", help="make files of seven times the weights")
    parser.add_argument("--directory", type=Path, help="for the checkpoints and targets (default: a temporary one)")
    given = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=given.directory) as made:
        scratch = Path(made)
        print(f"Llama TP4 x PP2 in bf16, {given.ranks} ranks, --max-memory-per-rank {human_bytes(given.budget)}\n")
        columns = " ".join(f"{name:>10}" for name in ("weights", "base", "peak", "above base"))
        print(f"layers direction      placement {columns}  within budget")
        rows, within = [], []
        largest = model_near("llama", int(given.size_gb * 1e9), GRID, parts=4)
        for part in (4, 2, 1):
            model = replace(largest, layers=largest.layers // part)
            source = scratch / f"megatron-{model.layers}"
            make_megatron(source, model, GRID, with_optimizer=given.with_optimizer)
            for direction, placement, job in jobs(source, scratch, given.ranks, given.budget):
                base_bytes = measure(given.ranks, [*job, "--dry-run"], scratch)
                peak_bytes = measure(given.ranks, job, scratch)
                rows.append(Row(model.layers, weights_bytes(model), direction, placement, base_bytes, peak_bytes))
                print(rows[-1].text(given.budget), flush=True)
                if part == 1 and placement == "gather":
                    within.append(f"{direction} " + convert_in_group(given.ranks, job, given.limit, scratch))
            shutil.rmtree(source)
            shutil.rmtree(scratch / "hf")
            shutil.rmtree(scratch / "back")
        print("\n" + "\n".join(within))
    return 0 if all(row.is_within(given.budget) for row in rows) and are_flat(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
