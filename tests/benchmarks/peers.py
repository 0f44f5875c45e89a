"""Times other converters beside this one: `python tests/benchmarks/peers.py`, some minutes.

A Llama goes from Hugging Face to Megatron and back at TP2, with two ranks, round by round in shuffled order: by
dist_convert, and by mbridge, mcore-bridge and megatron-bridge, whose packages pip fetches. They run without CUDA and
Transformer Engine here, over gloo (`tests/oracle/peers`, which also shows that their tensors are ours).

Theirs is one torchrun, which has the Megatron model in memory: nothing is written between the two directions. Ours are
two commands, and the second one reads the checkpoint that the first one has written. *Whole* is all that a user waits
for, with imports, their building of a model, and our final sync. Sources are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.bench import Machine, file_size, fill, make_sources, read_through, run_command
from tests.oracle.peers.environments import PACKAGES, packages_of
from tests.warm import REPOSITORY

OURS, RANKS = "dist_convert", 2
_COLUMNS = {
    "to Megatron, s": "to_megatron_seconds",
    "to Hugging Face, s": "to_huggingface_seconds",
    "whole, s": "whole_seconds",
    "CPU s": "cpu_seconds",
    "GB of all ranks": "peak_gb",
}


@dataclass(frozen=True)
class Trip:
    """One way to Megatron and back; the peak resident memory is the sum of all ranks' own."""

    to_megatron_seconds: float
    to_huggingface_seconds: float
    whole_seconds: float
    cpu_seconds: float
    peak_gb: float


def by_us(source: Path, target: Path, weights: int) -> Trip:
    """Convert to Megatron, and what was made back."""
    there, back = target / "megatron", target / "huggingface"
    convert = (
        sys.executable,
        "-m",
        "dist_convert",
        "convert",
        "--json",
        "-q",
        "--device",
        "cpu",
        "--ranks",
        str(RANKS),
    )
    found = []
    for read, write, flags in (
        (source, there, ("--to", "torch", "--target-tensor-parallel-size", str(RANKS))),
        (there, back, ("--to", "huggingface", *file_size(weights, "huggingface"))),
    ):
        sample, printed = run_command([*convert, *flags, str(read), str(write)])
        found.append((sample, json.loads(printed)))
    data = [max(profile["moved"] for profile in report["profiles"]) for _, report in found]
    peak_gb = RANKS * max(report["peak_memory_bytes"] for _, report in found) / 1e9  # at most: of the largest rank
    return Trip(*data, sum(one.whole_seconds for one, _ in found), sum(one.cpu_seconds for one, _ in found), peak_gb)


def by_peer(tool: str, source: Path, target: Path) -> Trip:
    """Have another converter load a model and save it."""
    found = f"PYTHONPATH={packages_of(tool)}:{REPOSITORY}"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS))
    program = ("-m", "tests.oracle.peers.program", tool, str(source), str(target), str(RANKS), "1", "1", str(RANKS))
    sample, printed = run_command(["env", found, "HF_HUB_OFFLINE=1", *torchrun, *program])
    said: dict[str, Any] = json.loads(printed.splitlines()[-1])
    seconds = said["import_seconds"], said["export_seconds"], sample.whole_seconds, sample.cpu_seconds
    return Trip(*seconds, said["peak_bytes"] / 1e9)


def measure(tools: Sequence[str], source: Path, weights: int, machine: Machine, rounds: int) -> dict[str, list[Trip]]:
    """Have every tool go there and back once a round, after one that does not count, in an order of chance."""
    trips: dict[str, list[Trip]] = defaultdict(list)
    chance, target = random.Random(0), machine.directory / "made"
    for number in range(rounds + 1):
        for tool in chance.sample(tools, len(tools)):
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            is_ready = machine.make_ready()
            target.mkdir()
            trip = by_us(source, target, weights) if tool == OURS else by_peer(tool, source, target)
            if number and is_ready:
                trips[tool].append(trip)
        print(f"round {number} of {rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return trips


def middle(trips: Sequence[Trip], field: str) -> float:
    return median(float(getattr(trip, field)) for trip in trips)


def table(tools: Sequence[str], trips: Mapping[str, Sequence[Trip]]) -> Iterator[str]:
    """Lines of Markdown: medians of every tool."""
    yield f"| | {' | '.join(_COLUMNS)} |"
    yield f"|---|{'---|' * len(_COLUMNS)}"
    for tool in tools:
        name = f"{tool}, {RANKS} ranks" if tool == OURS else PACKAGES[tool][0].replace("==", " ")
        cells = [f"{middle(trips[tool], field):.2f}" for field in _COLUMNS.values()]
        yield f"| {' | '.join([name, *cells])} |"


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=1.5, help="of the weights (default: 1.5)")
    parser.add_argument("--rounds", type=int, default=3, help="that count (default: 3)")
    parser.add_argument("--directory", type=Path, help="of sources, which stay, and targets (default: a temporary one)")
    parser.add_argument("--fill", type=Path, help="a page of Markdown that has the marks for the table")
    given = parser.parse_args()
    tools = [OURS, *PACKAGES]
    for tool in PACKAGES:
        packages_of(tool)
    with tempfile.TemporaryDirectory(prefix="peers-", dir=given.directory) as made:
        machine = Machine(Path(made), int(given.size_gb * 1e9))
        sources, weights = make_sources(given.directory or Path(made), machine.size_bytes)
        read_through(sources["huggingface"])
        trips = measure(tools, sources["huggingface"], weights, machine, given.rounds)
        about = (
            f"Weights of {weights / 1e9:.2f} GB, {given.rounds} rounds. {machine.described()} {machine.steadiness()}"
        )
    text = "\n".join([about, "", *table(tools, trips), ""])
    print(text)
    if given.fill:
        fill(given.fill, text, "peers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
