"""What was measured of a way, and what is asked of it: the targets, judged by medians."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from tests.benchmarks.ways import Sample, Way

#: The most seconds of a conversion's data phase, as a multiple of `cp`'s, for one rank and for two.
DIRECT_TARGETS = {1: 1.4, 2: 1.0}
#: The most seconds of one that gathers, as a multiple of what gloo alone and one that does not gather take together.
GATHER_TARGET = 1.2
#: The most seconds for a byte read of a cast, as a multiple of those without one.
CAST_TARGET = 1.3
#: The most seconds of a whole command beyond its data phase.
START_TARGET_SECONDS = 3.0

Value = Callable[[Sample], float]


@dataclass(frozen=True)
class Measured:
    """A way and its timed runs."""

    way: Way
    samples: tuple[Sample, ...] = ()

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


def ratio(measured: Measured, other: Measured, seconds_of: Callable[[Measured], float]) -> float:
    """How much longer a way takes than another; for a byte read, where they do not make the same files."""
    seconds, others_seconds = seconds_of(measured), seconds_of(other)
    if "fp32" in (measured.way.source, other.way.source):
        seconds, others_seconds = seconds / measured.way.read_bytes, others_seconds / other.way.read_bytes
    return seconds / others_seconds


def start_seconds(sample: Sample) -> float:
    """What the whole command takes besides its data phase: interpreters, headers, the plan, the final sync, the end."""
    return sample.whole_seconds - sample.data_seconds


def sync_seconds(sample: Sample) -> float:
    """What it takes to force the files to the disk."""
    return sample.synced_seconds - sample.data_seconds


def spread(measured: Measured) -> float:
    """The slowest round's data phase as a multiple of the quickest one's: how noisy the machine was."""
    return max(map(data, measured.samples)) / measured.least(data)


@dataclass(frozen=True)
class Verdict:
    """What was found, and the most that is asked for."""

    found: float
    most: float
    unit: str

    def __str__(self) -> str:
        return f"{self.found:.2f} (<= {self.most}) {self.unit} {'met' if self.found <= self.most else 'MISSED'}"


def verdicts(measured: Measured, cp: Measured, all_measured: Sequence[Measured]) -> list[Verdict]:
    """What is asked of a conversion's data phase, as far as something is, then what is asked of its start."""
    way = measured.way
    start = Verdict(measured.middle(start_seconds), START_TARGET_SECONDS, "s beside data")
    if way.tool != "ours":
        return [start] if way.tool == "torchrun" else []
    if way.source == "fp32":
        uncast = _find(all_measured, "ours", way.placement, way.ranks)
        return [*(Verdict(ratio(measured, same, _middle_data), CAST_TARGET, "x uncast") for same in uncast), start]
    if way.placement == "gather" and way.ranks > 1:
        return [*_gather_verdicts(measured, all_measured), start]
    if way.placement == "direct" and way.ranks in DIRECT_TARGETS:
        return [Verdict(ratio(measured, cp, _middle_data), DIRECT_TARGETS[way.ranks], "x cp"), start]
    return [start]


def _gather_verdicts(measured: Measured, all_measured: Sequence[Measured]) -> list[Verdict]:
    ranks, gathers = measured.way.ranks, measured.samples[0].gathered_bytes > 0
    alone = [_middle_data(one) for one in _find(all_measured, "gloo", "gather", ranks)] if gathers else [0.0]
    return [
        Verdict(_middle_data(measured) / (gloo_seconds + _middle_data(direct)), GATHER_TARGET, "x (gloo + direct)")
        for gloo_seconds in alone
        for direct in _find(all_measured, "ours", "direct", ranks)
    ]


def _middle_data(measured: Measured) -> float:
    return measured.middle(data)


def _find(all_measured: Sequence[Measured], tool: str, placement: str, ranks: int) -> list[Measured]:
    wanted = (tool, "plain", placement, ranks)
    return [one for one in all_measured if (one.way.tool, one.way.source, one.way.placement, one.way.ranks) == wanted]
