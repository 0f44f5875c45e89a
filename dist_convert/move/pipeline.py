"""Carries out one rank's steps: read, gather, place and write, several of them at a time.

Where nothing is gathered, some threads each do whole steps, so that what one has read is still in its core's cache when
it writes, and one reads while another writes. Where ranks gather, a reader thread fills the next slot while the main
thread gathers one and a writer thread empties the one before. What is read is gathered at once. Over gloo a gather goes
on while the steps after it are read, and written where nothing crosses in them: members of a group need not be equally
far. It is waited for when the next gather has begun. Only the main thread takes part in collectives, in the order of
the plan.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from queue import SimpleQueue

import torch

from dist_convert.move.timeline import Timeline
from dist_convert.move.work import Tools, Work
from dist_convert.plan.copies import BLOCK_BYTES
from dist_convert.plan.limits import STEP_BYTES, Limits
from dist_convert.plan.plan import Plan
from dist_convert.plan.steps import Step, messages, received_bytes, steps_of
from dist_convert.ranks.channel import Control
from dist_convert.ranks.collectives import Gatherer, World, begin_gather, make_gatherer
from dist_convert.ranks.device import cores_of_rank
from dist_convert.read.buffers import Slot, make_buffer
from dist_convert.read.file_reader import Counts, FileReader
from dist_convert.read.record_checks import Checksums, RecordChecks
from dist_convert.read.source import Listing
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
        checksums: of the source's records, see `RecordChecks`.
        may_overflow: finite values may become infinite in the target's dtype.
        read_ahead: steps whose reads the operating system is asked to begin before they are due: a file system across a
            network is slow with one request in flight.
        is_last_use: what was read leaves the page cache.

    Raises:
        SourceError, TargetError: with tensor and file.
        ValueOverflow: in the first block with such a value.
        LostRank, Interrupted: another rank has gone, or a signal has come.
    """
    started = time.perf_counter()
    number, member = plan.group_of(world.rank)
    limit, checks = limit_of(plan, world), RecordChecks(checksums)
    gatherer = make_gatherer(world, plan.groups[number].ranks, limit.send_bytes)
    tools = [
        Tools(
            FileReader(source, make_buffer(2 * BLOCK_BYTES), known, checks, is_last_use=is_last_use),
            FileWriter(target, journal.place),
            make_buffer(BLOCK_BYTES),
        )
        for _ in range(limit.threads)
    ]
    work = Work(member, journal, timeline, progress, may_overflow)
    steps = _with_those_ahead(_planned_ahead(steps_of(plan, world.rank)), min(read_ahead, _MOST_AHEAD))
    result = MoveResult()
    with ExitStack() as stack:
        for one in tools:
            stack.enter_context(closing(one.reader))
            stack.enter_context(closing(one.writer))
        if gatherer:
            _gather(steps, work, tools[0], gatherer, limit, world.device, result)
        else:
            _move_alone(steps, work, tools, result)
        tools[0].reader.read_missing()
    for one in tools:
        result.counts.add(one.reader.counts)
        result.written_bytes += one.writer.written_bytes
    result.seconds = time.perf_counter() - started
    return result


def limit_of(plan: Plan, world: World) -> Limits:
    """The sizes of this rank's buffers: it has no more threads than cores."""
    limit = plan.limits[plan.group_of(world.rank)[0]]
    return replace(limit, threads=min(limit.threads, cores_of_rank(world.local_size)))


#: Steps, each with those whose reads are asked for when it is read.
_Steps = Iterator[tuple[Step, Sequence[Step]]]


def _move_alone(steps: _Steps, work: Work, tools: Sequence[Tools], result: MoveResult) -> None:
    """Do whole steps, one in each of some threads at a time."""
    free = SimpleQueue[tuple[Tools, Slot]]()
    for one in tools:
        free.put((one, Slot(make_buffer(STEP_BYTES), make_buffer(0))))
    moving = deque[Future[list[Written]]]()
    done = count(1)

    def move_one(step: Step, later: Sequence[Step]) -> list[Written]:
        mine, slot = free.get()
        try:
            work.ask(mine.reader, later)
            return work.move(mine, step, slot)
        finally:
            free.put((mine, slot))

    def end_one() -> None:
        number = next(done)
        work.progress.doing(f"moving step {number}")
        with work.timeline.during("wait", f"for step {number}"):
            result.windows += moving.popleft().result()

    with ThreadPoolExecutor(len(tools), thread_name_prefix="mover") as threads:
        try:
            for step, later in steps:
                moving.append(threads.submit(move_one, step, later))
                if len(moving) > 2 * len(tools):  # none waits while the first one takes longer
                    end_one()
            while moving:
                end_one()
        finally:
            threads.shutdown(cancel_futures=True)


def _gather(
    steps: _Steps,
    work: Work,
    tools: Tools,
    gatherer: Gatherer,
    limit: Limits,
    device: torch.device,
    result: MoveResult,
) -> None:
    """Read, gather and write steps, each while others are in another of these states."""
    progress, timeline = work.progress, work.timeline
    free = [
        Slot(make_buffer(STEP_BYTES, device), make_buffer(limit.received_bytes, device)) for _ in range(limit.slots)
    ]
    reading, writing = deque[Future[tuple[Step, Slot]]](), deque[Future[Slot]]()
    # Number, step and slot of what is on its way between ranks, and what waits for it.
    gathering = deque[tuple[int, Step, Slot, Callable[[], None]]]()

    def read(step: Step, slot: Slot, later: Sequence[Step]) -> tuple[Step, Slot]:
        work.ask(tools.reader, later)
        work.read(tools.reader, step, slot)
        return step, slot

    def write(step: Step, slot: Slot) -> Slot:
        result.windows += work.write(tools, step, slot)
        return slot

    with (
        ThreadPoolExecutor(1, thread_name_prefix="reader") as reads,
        ThreadPoolExecutor(1, thread_name_prefix="writer") as writes,
    ):

        def end_gather() -> None:
            number, step, slot, wait = gathering.popleft()
            progress.doing(f"waiting for other ranks in step {number}")
            with timeline.during("gather", f"the rest of step {number}"):
                wait()
            writing.append(writes.submit(write, step, slot))

        number, upcoming = 0, next(steps, None)
        while upcoming or reading or gathering:
            if upcoming and len(reading) < _READING:
                while writing and writing[0].done():
                    free.append(writing.popleft().result())
                if not free:  # one is read and one gathered, so another is being written
                    progress.doing(f"writing step {number}")
                    with timeline.during("wait", "for the writer"):
                        free.append(writing.popleft().result())
                step, later = upcoming
                # The one that was freed last, as the processor's cache may still have it.
                reading.append(reads.submit(read, step, free.pop(), later))
                upcoming = next(steps, None)
                continue
            if not reading:
                end_gather()
                continue
            number += 1
            progress.doing(f"reading step {number}")
            with timeline.during("wait", "for the reader"):
                step, slot = reading.popleft().result()
            if not step.send_bytes:
                writing.append(writes.submit(write, step, slot))
                continue
            progress.doing(f"gathering step {number}")
            passed = messages(step)
            size_bytes = received_bytes(step, passed, work.member, limit)
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


def _planned_ahead(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps, planned more and more at a time: the first ones are waited for."""
    count = 1
    while planned := list(islice(steps, count)):
        yield from planned
        count = min(2 * count, _PLANNED_AHEAD)


def _with_those_ahead(steps: Iterator[Step], count: int) -> _Steps:
    upcoming = deque(islice(steps, count))
    later = tuple(upcoming)
    while upcoming:
        yield upcoming.popleft(), later
        later = tuple(islice(steps, 1))
        upcoming += later
