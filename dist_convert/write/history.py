"""What the journals of earlier runs prove: which bytes of the target are finished, with their checksums.

A line counts if the machine that wrote it has not been started anew since, or if a mark stands behind it. Whether it
has is known only where a rank of this run is on that machine; of any other machine, what is marked counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from dist_convert.records import Window
from dist_convert.write.checksums import combine
from dist_convert.write.file_writer import Written
from dist_convert.write.journal import JOURNAL_DIRECTORY, read_lines

CHANGES = ("overflowed", "rounded_norms")


@dataclass(frozen=True)
class History:
    """What earlier runs did.

    Attributes:
        written: finished bytes; what follows each other within one journal is joined.
        changed: for each of `CHANGES`, how many values of a tensor a cast changed.
    """

    written: tuple[Written, ...] = ()
    changed: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: {kind: {} for kind in CHANGES})


def journals(partial: Path) -> list[str]:
    """The names of all journals that this machine sees."""
    return sorted(path.name for path in (partial / JOURNAL_DIRECTORY).glob("run-*-rank-*"))


def last_run(names: Iterable[str]) -> int:
    """The highest number of a run that has left a journal, 0 where none has."""
    return max((int(name.split("-")[1]) for name in names), default=0)


def has_written(partial: Path, runs_before: int) -> bool:
    """Whether any run after the first so many has finished bytes of the target, as far as this machine sees."""
    fresh = [name for name in journals(partial) if last_run([name]) > runs_before]
    return any("wrote" in record for name in fresh for _, record in read_lines(partial / JOURNAL_DIRECTORY / name))


def read_journal(partial: Path, name: str, boots: Iterable[Sequence[str]]) -> dict[str, Any]:
    """What counts of one journal, in JSON values.

    Args:
        partial: the directory in which the target is made.
        name: one of `journals(partial)`.
        boots: (host, boot) of the machines that have a rank of this run.
    """
    lines = list(read_lines(partial / JOURNAL_DIRECTORY / name))
    head = lines[0][1] if lines and "run" in lines[0][1] else {}
    safe_bytes = max((record["mark"] for _, record in lines if "mark" in record), default=0)
    is_same_boot = bool(head.get("boot")) and [head.get("host"), head.get("boot")] in [list(boot) for boot in boots]
    written: list[Written] = [
        from_fields(values)
        for end_bytes, record in lines
        if is_same_boot or end_bytes <= safe_bytes
        for values in record.get("wrote", ())
    ]
    return {
        "run": last_run([name]),
        "wrote": [fields(one) for one in joined(written)],
        "lost": [[record["lost"], record["until"]] for _, record in lines if "lost" in record],
        **{kind: [record[kind] for _, record in lines if kind in record] for kind in CHANGES},
    }


def fields(written: Written) -> list[Any]:
    """The JSON values of what was written."""
    return [*astuple(written[0]), written[1]]


def from_fields(values: Sequence[Any]) -> Written:
    """What was written, from its JSON values."""
    return Window(*values[:-1]), values[-1]


def joined(written: Iterable[Written]) -> list[Written]:
    """The same bytes in fewer windows: those without gaps that follow each other become one."""
    found: list[Written] = []
    for window, checksum in sorted(written, key=lambda one: (one[0].file, one[0].runs, one[0].offset_bytes)):
        last, before = found[-1] if found else (None, None)
        if (
            last is not None
            and before is not None
            and checksum is not None
            and last.file == window.file
            and last.offset_bytes + last.run_bytes == window.offset_bytes
        ):
            size_bytes = last.run_bytes + window.run_bytes
            whole = combine([(before, last.run_bytes), (checksum, window.run_bytes)])
            found[-1] = (Window(last.file, last.offset_bytes, size_bytes), whole)
        else:
            found.append((window, checksum))
    return found


def history_of(records: Sequence[Mapping[str, Any]], damaged: Iterable[str] = ()) -> History:
    """Put the journals together.

    Args:
        records: of `read_journal`, of every journal.
        damaged: files that are not there any more, or not in their size.
    """
    lost_until: dict[str, int] = {}
    for record in records:
        for file, run in record["lost"]:
            lost_until[file] = max(run, lost_until.get(file, 0))
    gone = set(damaged)
    written = tuple(
        from_fields(values)
        for record in records
        for values in record["wrote"]
        if values[0] not in gone and record["run"] > lost_until.get(values[0], 0)
    )
    changed: dict[str, dict[str, int]] = {kind: {} for kind in CHANGES}
    for kind in CHANGES:
        # A block that was read twice, before a run ended and after, counts once.
        reads = {(file, tensor, *place): values for r in records for file, tensor, *place, values in r[kind]}
        for (_, tensor, *_), values in reads.items():
            changed[kind][tensor] = changed[kind].get(tensor, 0) + values
    return History(written, changed)
