"""Carries out one rank's steps: read, gather, place and write, each overlapping the others.

A reader thread fills the next slot while the main thread gathers one and a writer thread empties the one before. What
is read is gathered at once. Over gloo a gather goes on while the steps after it are read, and written where nothing
crosses in them: members of a group need not be equally far. It is waited for when the next gather has begun. Only the
main thread takes part in collectives, in the order of the plan.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from dist_convert.errors import ValueOverflow
from dist_convert.move.timeline import Timeline
from dist_convert.options import TARGET_DTYPES
from dist_convert.plan.copies import BLOCK_BYTES
from dist_convert.plan.limits import STEP_BYTES
from dist_convert.plan.plan import Plan
from dist_convert.plan.steps import Step, Write, messages, received_bytes, steps_of
from dist_convert.ranks.channel import Control
from dist_convert.ranks.collectives import World, begin_gather, make_gatherer
from dist_convert.read.buffers import CPU, Buffer, Slot, make_buffer
from dist_convert.read.file_reader import TORCH_DTYPES, Counts, FileReader
from dist_convert.read.source import Checksums, Listing
from dist_convert.records import View, counted
from dist_convert.write.files import FileWriter, Written
from dist_convert.write.journal import Journal

#: Steps that are read, or being read, before they are gathered.
_READING = 2

#: Steps that are planned and read ahead, at most: 4 GiB of blocks, whatever number is given.
_MOST_AHEAD = 1024

#: Steps that are planned at a time, at most: after each read and write the processor's cache has forgotten the planner.
_PLANNED_AHEAD = 8


@dataclass
class MoveResult:
    """What one rank did."""

    seconds: float = 0.0
    written_bytes: int = 0
    gathered_bytes: int = 0
    windows: list[Written] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


def move(
    plan: Plan,
    world: World,
    source: Path,
    known: Listing,
    target: Path,
    journal: Journal,
    progress: Control,
    timeline: Timeline,
    *,
    checksums: Checksums,
    may_overflow: bool,
    read_ahead: int,
    is_last_use: bool = False,
) -> MoveResult:
    """Do this rank's part of a plan.

    Args:
        plan, world: the same plan on every rank, and this rank.
        source: the iteration's directory as this rank sees it.
        known: what its files were when their headers were read.
        target: the directory that holds the target files in their final size.
        journal: of this rank, which learns what is finished.
        progress, timeline: hear of every step, and where the time goes.
        checksums: of the source's records, see `FileReader`.
        may_overflow: finite values may become infinite in the target's dtype.
        read_ahead: steps whose reads the operating system is asked to begin before they are due: a file system across a
            network is slow with one request in flight.
        is_last_use: what was read leaves the page cache.

    Raises:
        SourceError, TargetError: with tensor and file.
        ValueOverflow: in the first block with such a value.
        LostRank, Interrupted: another rank has gone, or a signal has come.
    """
    number, member = plan.group_of(world.rank)
    limit = plan.limits[number]
    gatherer = make_gatherer(world, plan.groups[number].ranks, limit.send_bytes)
    gathers_on = world.device if gatherer is not None else CPU
    slots = [
        Slot(make_buffer(STEP_BYTES, gathers_on), make_buffer(limit.received_bytes, gathers_on))
        for _ in range(limit.slots)
    ]
    reader = FileReader(source, make_buffer(2 * BLOCK_BYTES), known, checksums, is_last_use=is_last_use)
    writer = FileWriter(target)
    rows = make_buffer(BLOCK_BYTES)
    result = MoveResult(counts=reader.counts)
    started = time.perf_counter()

    def read(step: Step, slot: Slot, later: Sequence[Step]) -> tuple[Step, Slot]:
        for wanted in (wanted for one in later for wanted in one.reads if wanted.reader == member):
            reader.read_ahead(wanted.source)
        for wanted in step.reads:
            if wanted.reader == member:
                with timeline.during("read", wanted.source.tensor, wanted.source.size_bytes):
                    changed = reader.read(wanted.source, wanted.dtype, wanted.add, slot.data, wanted.offset_bytes)
                if changed.get("overflowed") and not may_overflow:
                    raise value_overflow(wanted.source.tensor, wanted.dtype, changed["overflowed"])
                for kind, values in changed.items():
                    journal.changed(kind, wanted.source, values)
        return step, slot

    def write(step: Step, slot: Slot) -> Slot:
        before = writer.written_bytes
        written = []
        for wanted in step.writes:
            if wanted.writer == member:
                with timeline.during("place", wanted.target.tensor, wanted.target.size_bytes):
                    target, values = _placed(wanted, step, slot, rows)
                with timeline.during("write", target.tensor, target.size_bytes):
                    written.append(writer.write(target, values))
        if written:
            journal.wrote(written)
            result.windows += written
        progress.add_progress(writer.written_bytes - before)
        return slot

    with (
        closing(reader),
        closing(writer),
        ThreadPoolExecutor(1, thread_name_prefix="reader") as reads,
        ThreadPoolExecutor(1, thread_name_prefix="writer") as writes,
    ):
        free, reading, writing = list(slots), deque[Future[tuple[Step, Slot]]](), deque[Future[Slot]]()
        # Number, step and slot of what is on its way between ranks, and what waits for it.
        gathering = deque[tuple[int, Step, Slot, Callable[[], None]]]()

        def end_gather() -> None:
            number, step, slot, wait = gathering.popleft()
            progress.doing(f"waiting for other ranks in step {number}")
            with timeline.during("gather", f"the rest of step {number}"):
                wait()
            writing.append(writes.submit(write, step, slot))

        steps = _planned_ahead(steps_of(plan, world.rank))
        upcoming = deque(islice(steps, min(read_ahead, _MOST_AHEAD)))
        later = tuple(upcoming)
        number = 0
        while upcoming or reading or gathering:
            if upcoming and len(reading) < _READING:
                while writing and writing[0].done():
                    free.append(writing.popleft().result())
                if not free:  # one is read and one gathered, so another is being written
                    progress.doing(f"writing step {number}")
                    with timeline.during("wait", "for the writer"):
                        free.append(writing.popleft().result())
                # The one that was freed last, as the processor's cache may still have it.
                reading.append(reads.submit(read, upcoming.popleft(), free.pop(), later))
                later = tuple(islice(steps, 1))
                upcoming += later
                continue
            if not reading:
                end_gather()
                continue
            number += 1
            progress.doing(f"reading step {number}")
            with timeline.during("wait", "for the reader"):
                step, slot = reading.popleft().result()
            wait = None
            if gatherer is not None and step.send_bytes:
                progress.doing(f"gathering step {number}")
                passed = messages(step)
                size_bytes = received_bytes(step, passed, member, limit)
                with timeline.during("gather", f"step {number}", size_bytes):
                    received = slot.received.tensor[: step.send_bytes * gatherer.members]
                    wait = begin_gather(gatherer, slot.data.tensor[: step.send_bytes], received, passed)
                result.gathered_bytes += size_bytes
            if wait is None:
                writing.append(writes.submit(write, step, slot))
                continue
            gathering.append((number, step, slot, wait))
            if len(gathering) > 1:
                end_gather()
        progress.doing(f"writing step {number}")
        with timeline.during("wait", "for the writer"):
            for future in writing:
                future.result()
    result.seconds = time.perf_counter() - started
    result.written_bytes = writer.written_bytes
    return result


def value_overflow(tensor: str, dtype: str, count: int) -> ValueOverflow:
    """The error about so many values of a tensor that become infinite in a dtype."""
    name = next(name for name, target in TARGET_DTYPES.items() if target == dtype)
    return ValueOverflow(
        f"finite values become infinite in {name}",
        tensor=tensor,
        found=f"{counted(count, 'such value')}; what follows was not looked at",
        remedy="choose a --target-params-dtype with a wider range and start anew with --overwrite, or accept "
        "infinities with --allow-overflow",
    )


def _planned_ahead(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps, planned more and more at a time: the first ones are waited for."""
    count = 1
    while planned := list(islice(steps, count)):
        yield from planned
        count = min(2 * count, _PLANNED_AHEAD)


def _placed(wanted: Write, step: Step, slot: Slot, rows: Buffer) -> tuple[View, memoryview]:
    """A window and its bytes: as they lie in a buffer where it is one whole read, else its parts put side by side."""
    target = wanted.target
    reads = [step.reads[part.read] for part in wanted.parts]
    # What this member has read itself lies where it was read to, what others have read where it was received.
    found = [
        (slot.data, read.offset_bytes)
        if read.reader == wanted.writer
        else (slot.received, read.reader * step.send_bytes + read.offset_bytes)
        for read in reads
    ]
    if len(reads) == 1 and reads[0].source.columns == target.columns and not target.is_transposed:
        buffer, start = found[0]
        return target, buffer.memory[start : start + target.size_bytes]
    dtype = TORCH_DTYPES[target.dtype]
    values = rows.tensor[: target.size_bytes].view(dtype)
    # A transposed window is written along its columns, which are contiguous in the file.
    matrix = values.view(target.columns, target.rows).T if target.is_transposed else values.view(target.rows, -1)
    column, turns = 0, wanted.turns
    for number, (part, read, (buffer, start)) in enumerate(zip(wanted.parts, reads, found, strict=True)):
        packed = buffer.tensor[start : start + read.size_bytes].view(dtype).view(target.rows // turns, -1)
        place = matrix[number::turns] if turns > 1 else matrix[:, column : column + part.columns]
        place.copy_(packed[:, part.column : part.column + part.columns])
        column += part.columns
    return target.transposed() if target.is_transposed else target, rows.memory[: target.size_bytes]
