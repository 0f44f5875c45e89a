"""What was measured as Markdown, and the places in files of the documentation that it fills.

A place begins with `<!-- bench: summary -->`, `<!-- bench: ranks -->` or `<!-- bench: tables -->` and ends with
`<!-- end -->`. What was measured of more than two ranks goes to `ranks`, all else to `summary`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.benchmarks.measured import (
    START_TARGET_SECONDS,
    Measured,
    data,
    ratio,
    spread,
    start_seconds,
    sync_seconds,
    synced,
    verdicts,
)
from tests.benchmarks.results import report
from tests.benchmarks.store import Kept, Result

_PLACE = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(path: Path, all_kept: Sequence[Kept]) -> None:
    """Put what was measured into its places in a file."""
    of_many = [kept for kept in all_kept if _most_ranks(kept) > 2]
    texts = {
        "summary": "\n\n".join(summary(kept) for kept in all_kept if kept not in of_many),
        "ranks": "\n\n".join(by_ranks(result) for kept in of_many for result in kept.results),
        "tables": "\n\n".join(f"```\n{report(kept)}\n```" for kept in all_kept),
    }
    path.write_text(_PLACE.sub(lambda place: f"{place[1]}{texts[place[2]]}\n{place[3]}", path.read_text()))


def by_ranks(result: Result) -> str:
    """A table with a column for each number of ranks that convert the plain source, each of them seeing all of it."""
    cp = result.measured[0]
    shown = [one for one in result.measured if (one.way.tool, one.way.placement) == ("ours", "direct")]
    rows = [
        [f"{result.case.title}, `direct`", *(f"{one.way.ranks}" for one in shown)],
        ["---"] * (len(shown) + 1),
        ["data phase, s", *(f"{one.middle(data):.2f}" for one in shown)],
        ["to cp", *(f"{ratio(one, cp, partial(Measured.middle, value=data)):.2f}" for one in shown)],
        ["CPU s", *(f"{one.middle(lambda sample: sample.data_cpu_seconds):.2f}" for one in shown)],
        ["GB that a rank reads, and writes", *(f"{one.way.read_bytes / one.way.ranks / 1e9:.2f}" for one in shown)],
        ["peak MB of a rank", *(f"{max(max(s.peak_bytes) for s in one.samples) / 1e6:.0f}" for one in shown)],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _most_ranks(kept: Kept) -> int:
    return max((one.way.ranks for result in kept.results for one in result.measured), default=0)


def summary(kept: Kept) -> str:
    """A table with a column for each case, of medians."""
    columns = [dict(_lines(result)) for result in kept.results]
    names = dict.fromkeys(name for column in columns for name in column)
    titles = [f"{result.case.family.capitalize()} {result.case.direction}" for result in kept.results]
    rows = [["", *titles], ["---"] * (len(titles) + 1)]
    rows += [[name, *(column.get(name, "") for column in columns)] for name in names]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _lines(result: Result) -> Iterator[tuple[str, str]]:
    """What is said of a case: name and value."""
    cp = result.measured[0]
    for one in result.measured:
        way = one.way
        to_cp, synced_to_cp = (
            f"{ratio(one, cp, partial(Measured.middle, value=value)):.2f}" for value in (data, synced)
        )
        name = f"{way.placement}, {way.ranks} {'rank' if way.ranks == 1 else 'ranks'}"
        if way.tool == "cp":
            yield "cp, GB/s", f"{way.moved_bytes / one.middle(data) / 1e9:.2f}"
            yield "cp, slowest round to quickest", f"{spread(one):.1f}"
        elif way.tool == "transformers":
            yield "transformers alone, to cp", to_cp
        elif way.tool == "gloo":
            yield f"{way.ranks} ranks, torchrun and joining a group alone, s", f"{one.middle(start_seconds):.1f}"
        elif way.tool == "torchrun":
            start = f"{name}, under torchrun, whole command beside data, s (target {START_TARGET_SECONDS})"
            yield start, f"{one.middle(start_seconds):.1f}"
        elif way.tool == "ours" and (way.source, way.placement) == ("plain", "direct"):
            yield from _judged(name, one, result)
            least = ratio(one, cp, partial(Measured.least, value=data))
            yield f"{name}, x cp, the quickest round of each", f"{least:.2f}"
            yield f"{name}, with final sync, to cp", synced_to_cp
            yield f"{name}, CPU s", f"{one.middle(lambda sample: sample.data_cpu_seconds):.2f}"
            start = f"{name}, whole command beside data, s (target {START_TARGET_SECONDS})"
            yield start, f"{one.middle(start_seconds):.1f}"
            yield f"{name}, of that the final sync, s", f"{one.middle(sync_seconds):.1f}"
            yield f"{name}, peak MB of a rank", f"{max(max(sample.peak_bytes) for sample in one.samples) / 1e6:.0f}"
        elif way.tool == "ours" and (way.source != "plain" or way.ranks > 1):
            beside = {"plain": "", "optimizer": ", beside optimizer", "fp32": ", from fp32"}[way.source]
            yield from _judged(name + beside, one, result)


def _judged(name: str, measured: Measured, result: Result) -> Iterator[tuple[str, str]]:
    """The verdict on the data phase."""
    for verdict in verdicts(measured, result.measured[0], result.measured)[:-1]:
        yield f"{name}, {verdict.unit} (target {verdict.most})", f"{verdict.found:.2f}"
