"""What a conversion says of itself: notes before it, a dry run's plan, at its end what was done and where time went."""

import re
import resource
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dist_convert.errors import shown_line
from dist_convert.models.catalog import LeftBehind
from dist_convert.move.pipeline import limit_of
from dist_convert.move.timeline import PHASES
from dist_convert.plan.plan import Plan
from dist_convert.plan.steps import bytes_of, messages, received_bytes, steps_of
from dist_convert.ranks.collectives import World
from dist_convert.records import JsonObject, __version__, counted, human_bytes, human_seconds, names, warnings_of

_STATUS = Path("/proc/self/status")


def peak_memory_bytes() -> int:
    """The most resident memory that this process has had."""
    # ru_maxrss would count what the launcher had before it became this process. The first line is any bytes.
    status = _STATUS.read_bytes() if _STATUS.is_file() else b""
    if found := re.search(rb"^VmHWM:\s*([0-9]+)", status, re.MULTILINE):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load_of(plan: Plan, world: World) -> dict[str, int]:
    """What this rank would do, by the names that `--json` gives it; what memory it has used counts in its peak.

    Each rank works this out for itself: that takes seconds for a large model.
    """
    group, member = plan.group_of(world.rank)
    load = {"rank": world.rank, "group": group, "read_bytes": 0, "received_bytes": 0, "written_bytes": 0}
    for step in steps_of(plan, world.rank):
        read_bytes, written_bytes = bytes_of(step, member)
        load["read_bytes"] += read_bytes
        load["received_bytes"] += received_bytes(step, messages(step), member, plan.limits[group])
        load["written_bytes"] += written_bytes
    buffers_bytes = limit_of(plan, world).total_bytes
    return {**load, "buffers_bytes": buffers_bytes, "peak_memory_bytes": peak_memory_bytes() + buffers_bytes}


def describe_plan(plan: Plan, free_bytes: int, report: "Report", partial: Path | None = None) -> str:
    """A dry run's answer: files, and what each rank would read, gather and write, which the report has.

    `partial` is what an earlier run has left, with which this one would go on.
    """
    if report.was_complete:
        return report_text(report)
    content = plan.content
    ranks, groups = counted(len(plan.visible), "rank"), counted(len(plan.groups), "group")
    lines = [
        f"{content.title}, {plan.placement} placement, {ranks} in {groups}, plan {content.digest[:16]}",
        "",
        f"{'rank':>5} {'group':>6} {'reads':>10} {'receives':>10} {'writes':>10} {'buffers':>10} {'peak memory':>12}",
    ]
    for row in report.ranks:
        rank, group, *amounts, peak_bytes = row.values()
        cells = " ".join(f"{human_bytes(amount):>10}" for amount in amounts)
        lines.append(f"{rank:5} {group:6} {cells} {human_bytes(peak_bytes):>12}")
    lines += ["", f"{'size':>10}  file"]
    lines += [f"{human_bytes(file.size_bytes):>10}  {file.name}" for file in content.files]
    lines += [
        "",
        f"{human_bytes(content.target_bytes)} to write to {report.target}, {human_bytes(free_bytes)} free",
        *([f"{partial} is unfinished: what it has is kept and not written again"] if partial else []),
        "dry run: the conversion would start; nothing was written",
    ]
    return "\n".join(map(shown_line, lines))


def start_line(plan: Plan, report: "Report", nodes: int) -> str:
    """What a conversion says first: what is made of what, by whom."""
    who = f"{counted(len(plan.visible), 'rank')} on {counted(nodes, 'node')}, {plan.placement} placement"
    ends = f"{report.source} ({report.source_format}) -> {report.target} ({report.target_format})"
    return f"dist_convert {__version__}: {plan.content.title}, {ends}, {human_bytes(report.size_bytes)}, {who}"


#: Of more ranks than this, only those that took longest are shown.
_LISTED_RANKS = 8


@dataclass(frozen=True)
class Report:
    """What a conversion was, and what all its ranks did.

    Bytes are sums over ranks, but for the peak memory, which is the worst rank's.

    Attributes:
        seconds: of all, from the first look at the target to its name.
        overflowed: finite values that became infinite, by tensor.
        rounded_norms: weights of norms that adding 1 could not represent exactly, by tensor.
        profiles: for each rank, the seconds from its first byte to its last ("moved"), and those of each phase.
        synced_seconds: that forcing the files to the disk took.
        source, target: directories; of a Megatron checkpoint, its iteration's.
        source_format, target_format: such as "torch".
        left_behind: what of the source is no part of the target: (what, how many, bytes).
        was_complete: an earlier run has made all of the target, and this one wrote nothing.
        files, size_bytes: the target's weights files, how many and how large.
        plan: of a dry run, which writes nothing: who would do what, for people.
        ranks: of a dry run, what each rank would do, in bytes.
        notes: what the user should know.
    """

    read_bytes: int = 0
    gathered_bytes: int = 0
    written_bytes: int = 0
    peak_memory_bytes: int = 0
    seconds: float = 0.0
    overflowed: Mapping[str, int] = field(default_factory=dict)
    rounded_norms: Mapping[str, int] = field(default_factory=dict)
    profiles: tuple[Mapping[str, float], ...] = ()
    synced_seconds: float = 0.0
    source: Path = Path()
    target: Path = Path()
    source_format: str = ""
    target_format: str = ""
    left_behind: LeftBehind = ()
    was_complete: bool = False
    files: int = 0
    size_bytes: int = 0
    plan: str = ""
    ranks: tuple[Mapping[str, int], ...] = ()
    notes: tuple[str, ...] = ()

    def with_outcomes(self, outcomes: Sequence[JsonObject]) -> "Report":
        """The same with what the ranks did, and what earlier runs left, added up."""
        found: dict[str, Any] = {"peak_memory_bytes": max(outcome.get("peak_memory_bytes", 0) for outcome in outcomes)}
        for name in ("read_bytes", "gathered_bytes", "written_bytes"):
            found[name] = sum(outcome.get(name, 0) for outcome in outcomes)
        for name in ("overflowed", "rounded_norms"):
            found[name] = dict(sum((Counter(outcome[name]) for outcome in outcomes), Counter[str]()))
        return replace(
            self, **found, profiles=tuple(outcome["profile"] for outcome in outcomes if "profile" in outcome)
        )


def report_text(report: Report, *, verbose: bool = False) -> str:
    """What a conversion says at its end: what the user should know, and a line that sums up; verbose: and the times."""
    if report.was_complete:
        return shown_line(f"done: {report.target} is complete already: an earlier run of this conversion has finished")
    lines = _lines_of_times(report) if verbose else []
    if report.overflowed:
        lines.append(
            f"{counted(sum(report.overflowed.values()), 'value')} became infinite in {names(report.overflowed)}"
        )
    if report.rounded_norms:
        lines.append(
            f"adding 1 was rounded in {counted(sum(report.rounded_norms.values()), 'value')} of norms "
            "(exact with --target-params-dtype fp32)"
        )
    seconds = human_seconds(report.seconds) if report.seconds >= 10 else f"{report.seconds:.1f} s"
    done = f"{counted(report.files, 'file')}, {human_bytes(report.size_bytes)}, {seconds}"
    if warnings := warnings_of(report.notes):
        done += f", {counted(len(warnings), 'warning')}"
    return "\n".join([*lines, shown_line(f"done: {report.target}  {done}")])


def _rate(report: Report, seconds: float) -> str:
    return f"{report.written_bytes / max(seconds, 1e-9) / 1e9:.2f} GB/s"


def _lines_of_times(report: Report) -> list[str]:
    """Seconds of each rank, in columns; of many ranks those that took longest, and the mean. Then those of all."""
    columns = ("moved", *PHASES)
    rows = [(f"rank {rank}", profile) for rank, profile in enumerate(report.profiles)]
    if len(rows) > _LISTED_RANKS:
        rows = sorted(rows, key=lambda row: -row[1]["moved"])[: _LISTED_RANKS - 1]
        rows.append(("mean", {c: sum(p[c] for p in report.profiles) / len(report.profiles) for c in columns}))
    longest = max(profile["moved"] for profile in report.profiles)
    return [
        f"{'seconds':10}" + "".join(f"{column:>9}" for column in columns),
        *(f"{name:10}" + "".join(f"{profile[column]:9.2f}" for column in columns) for name, profile in rows),
        f"data moved in {longest:.2f} s, {_rate(report, longest)}; synced to disk in {report.synced_seconds:.2f} s",
        f"read {human_bytes(report.read_bytes)}, wrote {human_bytes(report.written_bytes)} in {report.seconds:.1f} s, "
        f"{_rate(report, report.seconds)}, peak memory of the largest rank {human_bytes(report.peak_memory_bytes)}",
    ]


def report_details(report: Report) -> JsonObject:
    """A report in JSON values."""
    return {**asdict(report), "source": str(report.source), "target": str(report.target)}


def report_from_details(details: JsonObject) -> Report:
    """The inverse of `report_details`; keys that are no fields are ignored."""
    known = {one.name: details[one.name] for one in fields(Report)}
    known |= {name: Path(known[name]) for name in ("source", "target")}
    known |= {name: tuple(known[name]) for name in ("profiles", "notes", "ranks")}
    return Report(**{**known, "left_behind": tuple(map(tuple, known["left_behind"]))})
