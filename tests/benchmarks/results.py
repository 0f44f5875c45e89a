"""What was measured as a table: every way's minimum and median, its ratio to `cp`, and the targets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tests.benchmarks.measured import Measured, data, ratio, spread, synced, verdicts, whole
from tests.benchmarks.store import Kept, Result

_COLUMNS = (
    "way", "source", "placement", "ranks", "GB read", "written", "of files", "rounds", "data s: min", "median", "GB/s",
    "to cp: min", "median", "synced s: min", "median", "to cp: min", "median", "whole s", "CPU s: data", "whole",
    "MB per rank: peak", "gathered", "targets",
)  # fmt: skip


def report(kept: Kept) -> str:
    """The machine, and a table of each case."""
    return "\n\n".join(["\n".join(kept.machine), *map(table, kept.results)])


def table(result: Result) -> str:
    """The table of a case; `cp` comes first. Ratios are of seconds, for fp32 of seconds for a byte read."""
    cp = result.measured[0]
    rows = [list(_COLUMNS), *(_row(measured, cp, result.measured) for measured in result.measured)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    noise = f"{result.case.title}; the slowest round of cp took {spread(cp):.1f} times as long as the quickest"
    return "\n".join([noise, "", *("  ".join(map(_padded, row, widths)).rstrip() for row in rows)])


def _padded(cell: str, width: int) -> str:
    return cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)


def _row(measured: Measured, cp: Measured, all_measured: Sequence[Measured]) -> list[str]:
    way = measured.way
    peaks = max((sample.peak_bytes for sample in measured.samples), key=lambda peak: max(peak, default=0))
    ratios = [
        f"{ratio(measured, cp, partial(which, value=value)):.2f}"
        for value in (data, synced)
        for which in (Measured.least, Measured.middle)
    ]
    return [
        way.tool, way.source, way.placement or "-", str(way.ranks),
        *(f"{size_bytes / 1e9:.2f}" for size_bytes in (way.read_bytes, way.written_bytes, way.file_bytes)),
        str(len(measured.samples)), f"{measured.least(data):.3f}", f"{measured.middle(data):.3f}",
        f"{way.moved_bytes / measured.middle(data) / 1e9:.2f}", *ratios[:2],
        f"{measured.least(synced):.3f}", f"{measured.middle(synced):.3f}", *ratios[2:],
        f"{measured.middle(whole):.2f}",
        f"{measured.middle(lambda sample: sample.data_cpu_seconds):.2f}",
        f"{measured.middle(lambda sample: sample.whole_cpu_seconds):.2f}",
        " ".join(f"{peak / 1e6:.0f}" for peak in peaks) or "-",
        f"{measured.samples[0].gathered_bytes / way.ranks / 1e6:.0f}",
        "; ".join(map(str, verdicts(measured, cp, all_measured))) or "-",
    ]  # fmt: skip
