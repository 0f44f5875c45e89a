"""Compares conversions with copying the same bytes: `python tests/benchmarks/bench.py`, about a quarter of an hour.

Makes a Llama of random weights in every format. For each pair of Megatron's and Hugging Face's formats, and of the
others with Hugging Face, it times, round by round in shuffled order, one `cp --reflink=never` of what the conversion
makes, and the conversion with one rank and with two. Ratios are of the medians of one run. Besides, from `torch` to
Hugging Face: ranks that see their own shards only and gather over gloo, and fp32 weights that become bf16, whose ratio
is of seconds for a byte read; and to the same files from Hugging Face's in FP8.

*Data* is from the first byte moved to the last byte written, *whole* the command as a user gives it, with the start of
Python and the final sync. Sources are in the page cache. Before each sample as many bytes as it writes are written and
removed, untimed, until that is as quick as it was: where it takes half as long again, it is done again, up to five
times, and then the sample does not count. How many did not is said. A virtual machine's host may take back what was
free for a second or two, and then its first write is several times as slow: so `cp` waits as long as a conversion needs
to start, and what such a rest costs is said too. `--check` only judges the machine, and exits with 3 where it is not
quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.sources import (
    hand_out,
    make_fp8,
    make_megatron,
    make_metas,
    model_near,
    parse_grid,
    weights_bytes,
)
from tests.distributed.launching import environment

FORMATS = ("torch", "torch_dist", "huggingface")
PAIRS = (
    *(f"{source} to {to}" for source, to in product(FORMATS, FORMATS)),
    *("dcp to huggingface", "huggingface to dcp", "meta to huggingface"),
)
GRID, TARGET_GRID = "TP4xPP2", ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2")
NOT_QUIET = 3

_SLOW = 1.5
_TRIES = 5
#: About what a conversion takes from its start to its first byte.
_START_SECONDS = 1.5
_IDLE_SHARE = 0.9


@dataclass(frozen=True)
class Sample:
    """One run of a way; `peak_bytes` of the largest rank, 0 where it is not known."""

    data_seconds: float
    whole_seconds: float
    cpu_seconds: float
    peak_bytes: int = 0


@dataclass(frozen=True)
class Way:
    """One way from a source to a target.

    Attributes:
        pair: formats of source and target, as a heading.
        name: "cp", or what converts.
        line: the command.
        copied: what `cp` copies for this pair; "" for a way that makes other bytes.
        per_bytes: what its seconds are divided by when they are compared.
        most: of its ratio to `cp`; 0 where nothing is asked.
    """

    pair: str
    name: str
    line: tuple[str, ...]
    copied: Path
    per_bytes: int
    most: float = 0.0


@dataclass
class Machine:
    """Judges the machine by a known write."""

    directory: Path
    size_bytes: int
    quickest_seconds: float = float("inf")
    slow_samples: int = 0
    tries: list[float] = field(default_factory=list)

    def make_ready(self) -> bool:
        """Write and remove so many bytes until that is quick; whether it is."""
        is_ready = any(self.write() <= _SLOW * self.quickest_seconds for _ in range(_TRIES))
        self.slow_samples += not is_ready
        return is_ready

    def write(self) -> float:
        """The seconds of one such write."""
        piece, path = memoryview(bytes(1 << 20)), self.directory / "known"
        began = time.monotonic()
        with path.open("wb", buffering=0) as file:
            for _ in range(self.size_bytes >> 20):
                file.write(piece)
        seconds = time.monotonic() - began
        path.unlink()
        self.tries.append(seconds)
        self.quickest_seconds = min(self.quickest_seconds, seconds)
        return seconds

    def write_rested(self) -> tuple[float, float]:
        """The seconds of such a write right after another, and of one into memory that was free for a while."""
        at_once = min(self.write() for _ in range(3))
        time.sleep(2 * _START_SECONDS)
        return at_once, self.write()

    def described(self) -> str:
        """What it is, in a sentence."""
        with Path("/proc/meminfo").open() as file:
            memory_gb = int(file.readline().split()[1]) / 1e6
        line = ["df", "--output=fstype", str(self.directory)]
        file_system = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()[-1]
        return (
            f"{os.cpu_count()} cores, {memory_gb:.0f} GB, Linux {os.uname().release}, {file_system}; "
            f"Python {sys.version.split()[0]}, torch {version('torch')}."
        )

    def steadiness(self) -> str:
        """How many samples did not count as it was not ready, and what a rest costs, in two sentences."""
        said = "samples did not count, as a write of as many bytes before them took more than"
        at_once, rested = self.write_rested()
        takes = (
            f"Memory that was free for {2 * _START_SECONDS:.0f} s takes {rested / at_once:.1f} times as long to write."
        )
        return f"{self.slow_samples} {said} {_SLOW} times the quickest one. {takes}"

    def noise(self) -> str:
        """Why the machine is not quiet; "" where it is."""
        before = _idle_and_all()
        time.sleep(3.0)
        idle, ticks = (after - then for after, then in zip(_idle_and_all(), before, strict=True))
        if idle < _IDLE_SHARE * ticks:
            return f"others keep its cores busy: {1 - idle / ticks:.0%} of them for 3 s"
        for _ in range(2):  # memory that the host has taken back is had again
            self.write()
        seconds = [self.write() for _ in range(7)]
        if max(seconds) > _SLOW * min(seconds):
            return f"writes of {self.size_bytes / 1e9:.1f} GB take {min(seconds):.2f} to {max(seconds):.2f} s"
        at_once, rested = self.write_rested()
        if rested > _SLOW * at_once:
            return f"{rested:.2f} s, not {at_once:.2f}, after a rest: its host takes back free memory (docs/speed.md)"
        return ""


def _idle_and_all() -> tuple[int, int]:
    """Ticks of all cores, idle and in total, stolen ones among the latter: see proc(5)."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def run_command(line: Sequence[str]) -> tuple[Sample, str]:
    """Run a command; its seconds, those of its processors, and its standard output."""
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as said:
        began = time.monotonic()
        process = subprocess.Popen(line, env=environment(), stdin=subprocess.DEVNULL, stdout=printed, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        for file in (printed, said):
            file.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(line)}\n{said.read().decode(errors='replace')}\nexit code {process.returncode}")
        return Sample(seconds, seconds, usage.ru_utime + usage.ru_stime), printed.read().decode()


def run(way: Way, target: Path) -> Sample:
    """One sample of a way."""
    sample, printed = run_command([*way.line, str(target)])
    if way.name == "cp":
        return sample
    report: Mapping[str, Any] = json.loads(printed)
    data_seconds = max(profile["moved"] for profile in report["profiles"])
    return Sample(data_seconds, sample.whole_seconds, sample.cpu_seconds, report["peak_memory_bytes"])


def command(source: Path, to: str, *flags: str) -> tuple[str, ...]:
    """A conversion that lacks its target's path, which comes last."""
    grid = TARGET_GRID if to.startswith("torch") else ()
    line = (sys.executable, "-m", "dist_convert", "convert", "--json", "-q", "--device", "cpu", "--to", to)
    return (*line, *grid, *flags, str(source))


def make_sources(directory: Path, size_bytes: int, dtype: str = "bf16") -> tuple[dict[str, Path], int]:
    """The model in every format, and the bytes of its weights; what an earlier run has made stays."""
    grid = parse_grid(GRID)
    model = model_near("llama", size_bytes, grid, dtype)
    weights = weights_bytes(model, dtype)
    root = directory / f"llama-{dtype}-{weights}"
    found = {name: root / name for name in ((*FORMATS, "dcp", "meta") if dtype == "bf16" else ("torch",))}
    if not root.exists():
        making = root.with_suffix(".making")
        shutil.rmtree(making, ignore_errors=True)
        make_megatron(making / "torch", model, grid, dtype)
        for name in list(found)[1:-1]:
            run_command([*command(making / "torch", name, *file_size(weights, name)), str(making / name)])
        if "meta" in found:
            make_metas(making / "meta", model, making / "huggingface")
        making.rename(root)
    return found, weights


def file_size(weights: int, to: str) -> tuple[str, ...]:
    """A quarter of the model: ranks that write one file wait for each other, and a large model has files for each."""
    return ("--max-shard-size", str(weights // 4)) if to == "huggingface" else ()


def ways_of(pair: str, directory: Path, size_bytes: int) -> Iterator[Way]:
    """The ways of a pair, `cp` first; a directory that it copies is made where it is missing."""
    sources, weights = make_sources(directory, size_bytes)
    source, to = pair.split(" to ")
    copied, flags = directory / f"{source}-{to}", file_size(weights, to)
    most = 1.0 if {"dcp", "meta"} & {source, to} else 0.8 if to == "huggingface" != source else 0.9
    if not copied.exists():
        run_command([*command(sources[source], to, *flags), str(copied)])
    yield Way(pair, "cp", ("cp", "-r", "--reflink=never", str(copied)), copied, weights)
    for ranks, limit in (("1", 1.0), ("2", most)):
        line = command(sources[source], to, *flags, "--ranks", ranks)
        yield Way(pair, f"{ranks} rank{'s' * (ranks != '1')}", line, copied, weights, limit)
    if (source, to) == ("torch", "huggingface"):
        (iteration,) = sources["torch"].glob("iter_*")
        seen = hand_out(iteration, 2, sources["torch"] / "seen")
        line = command(seen, to, *flags, "--ranks", "2", "--placement", "gather")
        yield Way(pair, "2 ranks, gather over gloo", line, copied, weights, 0.85)
        wide, wide_weights = make_sources(directory, size_bytes, "fp32")
        line = command(wide["torch"], to, *flags, "--target-params-dtype", "bf16", "--ranks", "2")
        yield Way(pair, "2 ranks, fp32 to bf16, for a byte read", line, copied, wide_weights, 0.9)
        fp8 = sources["huggingface"].with_name("fp8")
        if not fp8.exists():
            make_fp8(fp8, sources["huggingface"])
        line = command(fp8, to, *flags, "--ranks", "2")
        yield Way(pair, "2 ranks, FP8 to bf16, for a byte written", line, copied, weights, 1.2)


def read_through(directory: Path) -> None:
    """Read all files of a directory, so that the page cache has them."""
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(8 << 20):
                    pass


def measure(ways: Sequence[Way], machine: Machine, rounds: int, chance: random.Random) -> dict[Way, list[Sample]]:
    """Time every way of a pair once a round, in an order of chance, after a round that does not count."""
    samples: dict[Way, list[Sample]] = {way: [] for way in ways}
    for way in ways:
        for directory in (way.copied, Path(way.line[-1])):
            read_through(directory)
    for number in range(rounds + 1):
        for way in chance.sample(ways, len(ways)):
            target = machine.directory / "made"
            shutil.rmtree(target, ignore_errors=True)
            os.sync()  # what was removed keeps no disk busy, and nothing else waits to be written
            is_ready = machine.make_ready()
            if way.name == "cp":
                time.sleep(_START_SECONDS)
            sample = run(way, target)
            if number and is_ready:
                samples[way].append(sample)
    shutil.rmtree(machine.directory / "made")
    if not all(samples.values()):
        sys.exit(f"{ways[0].pair}: the machine was never ready for some way: see --check")
    print(f"{ways[0].pair}: {rounds} rounds", file=sys.stderr, flush=True)
    return samples


def table(samples: Mapping[Way, Sequence[Sample]]) -> Iterator[str]:
    """Lines of Markdown: medians of every way, and its ratio to `cp` beside what is asked for."""
    yield "| from, to | way | data, s | GB/s | x cp | asked for | whole less data, s | CPU s | MB of a rank |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for way in samples:
        data, beside, cpu = (middle(samples[way], of) for of in (data_of, beside_of, cpu_of))
        peak = max(sample.peak_bytes for sample in samples[way]) // 10**6
        asked = f"{way.most} {'met' if ratio(samples, way) <= way.most else 'missed'}" if way.most else ""
        cells = [way.pair, way.name, f"{data:.2f}", f"{way.per_bytes / data / 1e9:.2f}", f"{ratio(samples, way):.2f}"]
        cells += [asked, f"{beside:.1f}" if peak else "", f"{cpu:.1f}", str(peak or "")]
        yield f"| {' | '.join(cells)} |"


def middle(samples: Sequence[Sample], of: Callable[[Sample], float]) -> float:
    return median(map(of, samples))


def data_of(sample: Sample) -> float:
    return sample.data_seconds


def beside_of(sample: Sample) -> float:
    return sample.whole_seconds - sample.data_seconds


def cpu_of(sample: Sample) -> float:
    return sample.cpu_seconds


def ratio(samples: Mapping[Way, Sequence[Sample]], way: Way) -> float:
    """The median seconds of a way's data to those of the `cp` of its pair, for a byte."""
    (cp,) = (one for one in samples if (one.pair, one.name) == (way.pair, "cp"))
    return middle(samples[way], data_of) / way.per_bytes / (middle(samples[cp], data_of) / cp.per_bytes)


def described(machine: Machine, samples: Mapping[Way, Sequence[Sample]]) -> str:
    """The machine in a line, and how steady it was."""
    cp = [sample.data_seconds for way, of_way in samples.items() if way.name == "cp" for sample in of_way]
    steady = f"Of {len(cp)} times `cp` took {min(cp):.2f} to {max(cp):.2f} s. {machine.steadiness()}"
    return f"{machine.described()} {steady}"


def fill(path: Path, text: str, mark: str = "bench") -> None:
    """Put a text between the marks of a page."""
    before = path.read_text()
    after = re.sub(rf"(?s)(<!-- {mark} -->\n).*?(<!-- end -->)", lambda found: found[1] + text + found[2], before)
    path.write_text(after)


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=1.5, help="of the weights (default: 1.5)")
    parser.add_argument("--rounds", type=int, default=5, help="that count (default: 5)")
    parser.add_argument(
        "--pair", nargs="+", choices=PAIRS, metavar="PAIR", help='such as "torch to huggingface" (default: all)'
    )
    parser.add_argument("--directory", type=Path, help="of sources, which stay, and targets (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument(
        "--check", action="store_true", help=f"only say whether the machine is quiet; {NOT_QUIET} if not"
    )
    parser.add_argument("--fill", type=Path, help="a page of Markdown that has the marks for the table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.directory) as made:
        machine = Machine(Path(made), int(given.size_gb * 1e9))
        if given.check:
            noise = machine.noise()
            print(f"not quiet: {noise}" if noise else "quiet")
            return NOT_QUIET if noise else 0
        sources, chance = given.directory or Path(made), random.Random(given.seed)
        samples: dict[Way, list[Sample]] = {}
        for pair in given.pair or PAIRS:  # one after the other: the page cache must hold what all ways read
            ways = list(ways_of(pair, sources, machine.size_bytes))
            samples |= measure(ways, machine, given.rounds, chance)
            shutil.rmtree(ways[0].copied)
        text = "\n".join([described(machine, samples), "", *table(samples), ""])
    print(text)
    if given.fill:
        fill(given.fill, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
