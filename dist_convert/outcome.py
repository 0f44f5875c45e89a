"""What a conversion has done and where its time went, as it says at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_convert.report import names
from dist_convert.timeline import PHASES
from dist_convert.units import human_bytes

#: Of more ranks than this, only those that took longest are shown.
_LISTED_RANKS = 8


@dataclass(frozen=True)
class Outcome:
    """What all ranks together did. Bytes are sums over ranks, but for the peak memory, which is the worst rank's.

    Attributes:
        seconds: of all, from the first look at the target to its name.
        profiles: for each rank, the seconds from its first byte to its last ("moved"), and those of each phase.
        synced_seconds: that forcing the files to the disk took.
    """

    read_bytes: int
    gathered_bytes: int
    written_bytes: int
    peak_memory_bytes: int
    seconds: float
    overflowed: Mapping[str, int]
    rounded_norms: Mapping[str, int]
    profiles: tuple[Mapping[str, float], ...] = ()
    synced_seconds: float = 0.0

    @staticmethod
    def of_ranks(outcomes: Sequence[Mapping[str, Any]], seconds: float) -> Outcome:
        """Add the ranks' own outcomes up."""
        overflowed: Counter[str] = Counter()
        rounded: Counter[str] = Counter()
        for outcome in outcomes:
            overflowed.update(outcome["overflowed"])
            rounded.update(outcome["rounded_norms"])
        return Outcome(
            sum(outcome["read_bytes"] for outcome in outcomes),
            sum(outcome["gathered_bytes"] for outcome in outcomes),
            sum(outcome["written_bytes"] for outcome in outcomes),
            max((outcome["peak_memory_bytes"] for outcome in outcomes), default=0),
            seconds,
            dict(overflowed),
            dict(rounded),
            tuple(outcome["profile"] for outcome in outcomes if "profile" in outcome),
        )


def outcome_text(target: Path, outcome: Outcome) -> str:
    """What a conversion says at its end: where the time went, and a line that sums up."""
    return "\n".join([*_profile_lines(outcome), _outcome_line(target, outcome)])


def _profile_lines(outcome: Outcome) -> list[str]:
    """Seconds of each rank, in columns; of many ranks those that took longest, and the mean."""
    if not outcome.profiles:
        return []
    columns = ("moved", *PHASES)
    rows = [(f"rank {rank}", profile) for rank, profile in enumerate(outcome.profiles)]
    if len(rows) > _LISTED_RANKS:
        rows = sorted(rows, key=lambda row: -row[1]["moved"])[: _LISTED_RANKS - 1]
        rows.append(("mean", {c: sum(p[c] for p in outcome.profiles) / len(outcome.profiles) for c in columns}))
    longest = max(profile["moved"] for profile in outcome.profiles)
    rate = outcome.written_bytes / max(longest, 1e-9) / 1e9
    return [
        f"{'seconds':10}" + "".join(f"{column:>9}" for column in columns),
        *(f"{name:10}" + "".join(f"{profile[column]:9.2f}" for column in columns) for name, profile in rows),
        f"data moved in {longest:.2f} s, {rate:.2f} GB/s; forced to the disk in {outcome.synced_seconds:.2f} s",
    ]


def _outcome_line(target: Path, outcome: Outcome) -> str:
    rate = outcome.written_bytes / max(outcome.seconds, 1e-9) / 1e9
    line = (
        f"{target}: read {human_bytes(outcome.read_bytes)}, wrote {human_bytes(outcome.written_bytes)} "
        f"in {outcome.seconds:.1f} s, {rate:.2f} GB/s, "
        f"peak memory of the largest rank {human_bytes(outcome.peak_memory_bytes)}"
    )
    if outcome.overflowed:
        line += f"; {sum(outcome.overflowed.values())} values became infinite in {names(outcome.overflowed)}"
    if outcome.rounded_norms:
        line += (
            f"; adding 1 was rounded in {sum(outcome.rounded_norms.values())} values of norms "
            "(exact with --target-params-dtype fp32)"
        )
    return line
