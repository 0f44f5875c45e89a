"""What was measured, as a table and as JSON: every way's minimum and median, its ratio to `cp`, and the targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from tests.benchmarks.cases import Case
from tests.benchmarks.ways import Sample, Way

#: The most seconds of a conversion's data phase, as a multiple of `cp`'s, for one rank and for two.
DIRECT_TARGETS = {1: 1.4, 2: 1.0}
#: The most seconds for a byte read of a cast, as a multiple of those without one.
CAST_TARGET = 1.3
#: The most seconds of a whole command beyond its data phase.
START_TARGET_SECONDS = 3.0

Value = Callable[[Sample], float]


@dataclass(frozen=True)
class Measured:
    """A way and its timed runs."""

    way: Way
    samples: tuple[Sample, ...]

    def least(self, value: Value) -> float:
        return min(map(value, self.samples))

    def middle(self, value: Value) -> float:
        return median(map(value, self.samples))


def data(sample: Sample) -> float:
    return sample.data_seconds


def synced(sample: Sample) -> float:
    return sample.synced_seconds


def whole(sample: Sample) -> float:
    return sample.whole_seconds


def table(case: Case, all_measured: Sequence[Measured]) -> str:
    """The table of a case; `cp` comes first. Ratios are of seconds for a byte read."""
    cp = all_measured[0]
    columns = [
        "way", "source", "placement", "ranks", "GB read", "written", "data s: min", "median", "GB/s", "to cp: min",
        "median", "synced s: min", "median", "to cp: min", "median", "whole s", "CPU s: data", "whole",
        "MB per rank: peak", "gathered", "targets",
    ]  # fmt: skip
    rows = [columns, *(_row(measured, cp, all_measured) for measured in all_measured)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rounds = len(cp.samples)
    return "\n".join([f"{case.title}; {rounds} rounds", "", *lines])


def _row(measured: Measured, cp: Measured, all_measured: Sequence[Measured]) -> list[str]:
    way = measured.way
    peaks = max((sample.peak_bytes for sample in measured.samples), key=lambda peak: max(peak, default=0))
    ratios = [
        f"{ratio(measured, cp, lambda one, value=value, which=which: getattr(one, which)(value)):.2f}"
        for value in (data, synced)
        for which in ("least", "middle")
    ]
    return [
        way.tool, way.source, way.placement or "-", str(way.ranks), f"{way.read_bytes / 1e9:.2f}",
        f"{way.written_bytes / 1e9:.2f}",
        f"{measured.least(data):.3f}", f"{measured.middle(data):.3f}",
        f"{way.read_bytes / measured.middle(data) / 1e9:.2f}", *ratios[:2],
        f"{measured.least(synced):.3f}", f"{measured.middle(synced):.3f}", *ratios[2:],
        f"{measured.middle(whole):.2f}",
        f"{measured.middle(lambda sample: sample.data_cpu_seconds):.2f}",
        f"{measured.middle(lambda sample: sample.whole_cpu_seconds):.2f}",
        " ".join(f"{peak / 1e6:.0f}" for peak in peaks) or "-",
        f"{measured.samples[0].gathered_bytes / way.ranks / 1e6:.0f}",
        "; ".join(verdicts(measured, cp, all_measured)) or "-",
    ]  # fmt: skip


def ratio(measured: Measured, other: Measured, seconds_of: Callable[[Measured], float]) -> float:
    """How much longer a way takes than another; for a byte read, where they do not make the same files."""
    seconds, others_seconds = seconds_of(measured), seconds_of(other)
    if "fp32" in (measured.way.source, other.way.source):
        seconds, others_seconds = seconds / measured.way.read_bytes, others_seconds / other.way.read_bytes
    return seconds / others_seconds


def verdicts(measured: Measured, cp: Measured, all_measured: Sequence[Measured]) -> list[str]:
    """What is asked of a way's medians, and whether they do it."""
    way, said = measured.way, []
    if way.tool != "ours":
        return []
    if way.source == "fp32":
        uncast = ("plain", way.placement, way.ranks)
        for same in (m for m in all_measured if (m.way.source, m.way.placement, m.way.ranks) == uncast):
            found = ratio(measured, same, lambda one: one.middle(data))
            said.append(_verdict(f"{found:.2f} (<= {CAST_TARGET}) x uncast", found <= CAST_TARGET))
    elif way.placement == "direct" and way.ranks in DIRECT_TARGETS:
        found, most = ratio(measured, cp, lambda one: one.middle(data)), DIRECT_TARGETS[way.ranks]
        said.append(_verdict(f"{found:.2f} (<= {most}) x cp", found <= most))
    start_seconds = measured.middle(lambda sample: sample.whole_seconds - sample.data_seconds)
    start = f"{start_seconds:.1f} (<= {START_TARGET_SECONDS}) s beside data"
    return [*said, _verdict(start, start_seconds <= START_TARGET_SECONDS)]


def _verdict(text: str, is_met: bool) -> str:
    return f"{text} {'met' if is_met else 'MISSED'}"


def write_json(path: Path, results: Sequence[tuple[Case, Sequence[Measured]]]) -> None:
    """Keep every sample, for another table or a chart."""
    cases = [{"case": asdict(case), "measured": [asdict(one) for one in measured]} for case, measured in results]
    path.write_text(json.dumps(cases, indent=1))


def read_json(path: Path) -> list[tuple[Case, list[Measured]]]:
    """What `write_json` has kept."""
    return [
        (
            Case(**entry["case"]),
            [
                Measured(
                    Way(**one["way"]),
                    tuple(Sample(**(s | {"peak_bytes": tuple(s["peak_bytes"])})) for s in one["samples"]),
                )
                for one in entry["measured"]
            ],
        )
        for entry in json.loads(path.read_text())
    ]
