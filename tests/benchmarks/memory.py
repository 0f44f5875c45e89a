"""Measures that a conversion's memory follows its budget and not the model: `python tests/benchmarks/memory.py`.

A Llama checkpoint at TP4 x PP2 is made with a quarter of the layers, with half of them and whole. Each is converted to
Hugging Face by ranks that all see it (direct), and by ranks that see the files of some tensor ranks each (gather); the
result is converted back to the same grid. The worst rank's peak resident memory is at most what `--dry-run` says, and
peaks of one kind are within 5% of each other, or the exit code is 1.

Where this is root on Linux with memory control groups (version 1), the whole model is then converted between formats in
a group whose limit holds all ranks and their page cache together, and is far smaller than the model; a `cp` of what was
made, in the same group, is what its seconds are compared with. Neither finds anything in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dist_convert.records import human_bytes, parse_bytes
from tests.benchmarks.bench import FORMATS
from tests.benchmarks.sources import GRIDS, grid_flags, hand_out, make_megatron, model_near, parse_grid, weights_bytes
from tests.distributed.launching import environment

GRID = parse_grid(GRIDS["llama"])
#: Within one format, so that there is something to do.
OTHER_GRID = ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "4")
GROUPS = Path("/sys/fs/cgroup/memory")
_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class Row:
    """One line of the table: a conversion, and the memory of its worst rank in bytes, as was said before and found."""

    layers: int
    weights_bytes: int
    what: str
    said_bytes: int
    peak_bytes: int

    def __str__(self) -> str:
        cells = " ".join(f"{human_bytes(c):>10}" for c in (self.weights_bytes, self.said_bytes, self.peak_bytes))
        return f"{self.layers:6} {self.what:24} {cells}  {'yes' if self.peak_bytes <= self.said_bytes else 'NO'}"


def are_flat(rows: Sequence[Row]) -> bool:
    """Whether the peaks of each kind stay within 5% of each other, whatever the number of layers."""
    peaks: dict[str, list[int]] = {}
    for row in rows:
        peaks.setdefault(row.what, []).append(row.peak_bytes)
    return all(max(of_kind) <= 1.05 * min(of_kind) for of_kind in peaks.values())


def run(line: Sequence[str], group: Path | None = None) -> str:
    """Run a command, in a control group if one is given; its standard output."""

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(line, env=environment(), capture_output=True, text=True, preexec_fn=enter, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(line)}\n{done.stderr}")
    return done.stdout


def convert(job: Sequence[str], group: Path | None = None) -> dict[str, Any]:
    """Convert; the report."""
    report: dict[str, Any] = json.loads(run([sys.executable, "-m", "dist_convert", "convert", *job], group))
    return report


def jobs(source: Path, scratch: Path, how: Sequence[str], ranks: int) -> Iterator[tuple[str, list[str]]]:
    """Heading and flags of each conversion; the way back needs what the way there has made."""
    (iteration,) = source.glob("iter_*")
    seen = hand_out(iteration, ranks, source / "seen")
    hf, back = str(scratch / "hf"), str(scratch / "back")
    yield "to Hugging Face, direct", [str(source), hf, "--to", "huggingface", *how]
    yield "to Hugging Face, gather", [str(seen), hf, "--to", "huggingface", *how, "--placement", "gather"]
    yield "to torch", [hf, back, "--to", "torch", *grid_flags(GRID), *how]


@contextmanager
def cold(limit_bytes: int) -> Iterator[Path]:
    """A group whose processes may hold so much memory together, page cache included, in which there is nothing yet."""
    os.sync()
    _CACHES.write_text("3")
    group = GROUPS / f"dist-convert-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield group
    finally:
        (group / "memory.force_empty").write_text("0")
        group.rmdir()


def beyond_memory(source: Path, scratch: Path, how: Sequence[str], limit_bytes: int) -> Iterator[str]:
    """Lines about conversions in a group with such a limit, and `cp` in the same."""
    if not os.access(GROUPS / "cgroup.procs", os.W_OK):
        yield "no writable memory control groups (version 1) here"
        return
    copied, places = scratch / "copied", {name: scratch / name for name in FORMATS} | {"torch": source}
    # The first two make what others read.
    pairs = dict.fromkeys([("torch", "torch_dist"), ("torch_dist", "huggingface"), *product(FORMATS, FORMATS)])
    for read, to in pairs:
        target = scratch / "made" if places[to].exists() else places[to]
        flags = ["--to", to, *(() if to == "huggingface" else grid_flags(GRID) if read != to else OTHER_GRID)]
        with cold(limit_bytes) as group:
            report = convert([str(places[read]), str(target), *flags, *how], group)
        with cold(limit_bytes) as group:
            began = time.monotonic()
            run(["cp", "-r", "--reflink=never", str(target), str(copied)], group)
            cp_seconds = time.monotonic() - began
        shutil.rmtree(copied)
        if target != places[to]:
            shutil.rmtree(target)
        seconds = max(profile["moved"] for profile in report["profiles"])
        yield (
            f"{f'{read} to {to}':26} data {seconds:6.1f} s, cp {cp_seconds:6.1f} s, {seconds / cp_seconds:.2f} x cp, "
            f"peak of a rank {human_bytes(report['peak_memory_bytes'])}"
        )


def main() -> int:
    """Measure, print the table; 1 if a peak exceeds what was said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=8.0, help="of the largest model, in bf16 (default: 8)")
    parser.add_argument("--budget", type=parse_bytes, default="128MB", help="--max-memory-per-rank (default: 128MB)")
    parser.add_argument("--ranks", type=int, default=2, choices=range(1, GRID.tensor + 1), help="(default: 2)")
    parser.add_argument("--limit", type=parse_bytes, default="2GB", help="of the control group (default: 2GB)")
    parser.add_argument("--directory", type=Path, help="for the checkpoints and targets (default: a temporary one)")
    given = parser.parse_args()

    how = ["--overwrite", "--device", "cpu", "--json", "-q", "--ranks", str(given.ranks)]
    how += ["--max-memory-per-rank", str(given.budget)]
    with tempfile.TemporaryDirectory(dir=given.directory) as made:
        scratch = Path(made)
        print(f"Llama TP4 x PP2 in bf16, {given.ranks} ranks, --max-memory-per-rank {human_bytes(given.budget)}\n")
        print(f"layers {'conversion':24} {'weights':>10} {'dry run':>10} {'peak':>10}  as said")
        rows = []
        largest = model_near("llama", int(given.size_gb * 1e9), GRID, parts=4)
        for part in (4, 2, 1):
            model = replace(largest, layers=largest.layers // part)
            source = scratch / f"megatron-{model.layers}"
            make_megatron(source, model, GRID)
            for what, job in jobs(source, scratch, how, given.ranks):
                said_bytes = max(rank["peak_memory_bytes"] for rank in convert([*job, "--dry-run"])["ranks"])
                peak_bytes = convert(job)["peak_memory_bytes"]
                rows.append(Row(model.layers, weights_bytes(model), what, said_bytes, peak_bytes))
                print(rows[-1], flush=True)
            shutil.rmtree(scratch / "hf")
            shutil.rmtree(scratch / "back")
            if part != 1:
                shutil.rmtree(source)
        print(f"\nin a control group of {human_bytes(given.limit)} for all ranks and their page cache:")
        for line in beyond_memory(source, scratch, how, given.limit):
            print(line, flush=True)
    return 0 if all(row.peak_bytes <= row.said_bytes for row in rows) and are_flat(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
