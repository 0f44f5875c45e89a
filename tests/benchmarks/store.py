"""What was measured, kept in a file: a table or a chart can be made of it, and more rounds added."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.cases import Case
from tests.benchmarks.measured import Measured
from tests.benchmarks.ways import Ready, Sample, Way


@dataclass(frozen=True)
class Result:
    """A case, and all that was measured of it."""

    case: Case
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class Kept:
    """All that a file keeps.

    Attributes:
        machine: lines about it, see `machine.describe`.
        code: digest of the code that was timed.
        results: in the order in which they were measured first.
    """

    machine: tuple[str, ...]
    code: str
    results: tuple[Result, ...] = ()

    def of(self, case: Case, ready: Sequence[Ready]) -> list[Measured]:
        """What is kept of some ways of a case; nothing yet of a new one."""
        known = {one.way: one for result in self.results if result.case == case for one in result.measured}
        return [known.get(one.way, Measured(one.way)) for one in ready]

    def put(self, case: Case, measured: Sequence[Measured]) -> Kept:
        """The same with these ways of a case."""
        results = {result.case: {one.way: one for one in result.measured} for result in self.results}
        results.setdefault(case, {}).update((one.way, one) for one in measured if one.samples)
        filled = {case: tuple(ways.values()) for case, ways in results.items() if ways}
        return Kept(self.machine, self.code, tuple(Result(case, ways) for case, ways in filled.items()))


def write(path: Path, kept: Kept) -> None:
    """Write all samples down."""
    path.write_text(json.dumps(asdict(kept), indent=1))


def read(path: Path) -> Kept:
    """What `write` has written."""
    stored = json.loads(path.read_text())
    results = [
        Result(Case(**result["case"]), tuple(map(_measured, result["measured"]))) for result in stored["results"]
    ]
    return Kept(tuple(stored["machine"]), stored["code"], tuple(results))


def _measured(stored: dict[str, Any]) -> Measured:
    samples = [Sample(**(one | {"peak_bytes": tuple(one["peak_bytes"])})) for one in stored["samples"]]
    return Measured(Way(**stored["way"]), tuple(samples))
