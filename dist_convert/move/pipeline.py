"""Carries out one rank's steps: read, gather, place and write, several of them at a time.

Some threads do the work. Of a step that needs no other rank one of them does all, so that what it has read is still in
its core's cache when it writes, and one reads while another writes. What ranks gather one thread reads, the main thread
gathers and one thread writes, each while others are at other steps. Over gloo a gather goes on while the steps after it
are read, and written where nothing crosses in them: members of a group need not be equally far. It is waited for when
the next gather has begun. Only the main thread takes part in collectives, in the order of the plan.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from queue import SimpleQueue
from threading import Event

from isal import isal_zlib

from dist_convert.errors import ValueOverflow
from dist_convert.move.timeline import Timeline
from dist_convert.options import TARGET_DTYPES
from dist_convert.plan.copies import BLOCK_BYTES
from dist_convert.plan.plan import STEP_BYTES, Limits, Plan
from dist_convert.plan.steps import Step, Write, messages, received_bytes, steps_of
from dist_convert.ranks.channel import Control
from dist_convert.ranks.collectives import Gatherer, World, begin_gather, make_gatherer
from dist_convert.ranks.device import cores_of_rank
from dist_convert.ranks.timeout import wait_for_end
from dist_convert.read.file_reader import PIECE_BYTES, TORCH_DTYPES, Buffer, FileReader, Slot, make_buffer
from dist_convert.read.record_checks import RecordChecks
from dist_convert.read.source import pushes_others_out, usual_read_ahead
from dist_convert.records import View, Window, counted
from dist_convert.write.files import Directory, FileWriter, Written
from dist_convert.write.journal import Journal
from dist_convert.write.task import Task

#: Steps that are read, or being read, before they are gathered.
_READING = 2

#: Steps that are planned and read ahead, at most: 4 GiB of blocks, whatever number is given.
_MOST_AHEAD = 1024

#: Steps that are planned at a time, at most: after each read and write the processor's cache has forgotten the planner.
_PLANNED_AHEAD = 8


@dataclass(frozen=True)
class Tools:
    """What a thread works with; the slot is for steps that need no other rank."""

    reader: FileReader
    writer: FileWriter
    rows: Buffer
    slot: Slot


@dataclass(frozen=True)
class Work:
    """What this rank does in a step, in any thread; `member` is its position in its group."""

    member: int
    journal: Journal
    timeline: Timeline
    progress: Control
    may_overflow: bool
    changed: list[tuple[str, str, int]]

    def ask(self, reader: FileReader, later: Sequence[Step]) -> None:
        """Have the operating system begin to read what this rank has to read later."""
        for wanted in (wanted for one in later for wanted in one.reads if wanted.reader == self.member):
            reader.read_ahead(wanted.source)

    def read(self, reader: FileReader, step: Step, slot: Slot, but: Container[int] = ()) -> None:
        """Read what this rank has to, but for reads of some numbers."""
        for number, wanted in enumerate(step.reads):
            if wanted.reader == self.member and number not in but:
                with self.timeline.during("read", wanted.source.tensor, wanted.source.size_bytes):
                    changed = reader.read(wanted.source, wanted.dtype, wanted.add, slot.data, wanted.offset_bytes)
                if changed.get("overflowed") and not self.may_overflow:
                    raise value_overflow(wanted.source.tensor, wanted.dtype, changed["overflowed"])
                for kind, values in changed.items():
                    self.journal.changed(kind, wanted.source, values)
                    self.changed.append((kind, wanted.source.tensor, values))

    def write(self, tools: Tools, step: Step, slot: Slot) -> list[Written]:
        """Place and write what this rank has to."""
        mine = [wanted for wanted in step.writes if wanted.writer == self.member]
        return self._noted([self._write(tools, wanted, step, slot) for wanted in mine])

    def move(self, tools: Tools, step: Step) -> list[Written]:
        """All of a step that needs no other rank."""
        copied = _copied_as_is(step)
        self.read(tools.reader, step, tools.slot, but=copied.values())
        written = [
            self._copy(tools, step.reads[copied[number]].source, wanted.target)
            if number in copied
            else self._write(tools, wanted, step, tools.slot)
            for number, wanted in enumerate(step.writes)
            if wanted.writer == self.member
        ]
        return self._noted(written)

    def _write(self, tools: Tools, wanted: Write, step: Step, slot: Slot) -> Written:
        with self.timeline.during("place", wanted.target.tensor, wanted.target.size_bytes):
            target, values = _placed(wanted, step, slot, tools.rows)
        with self.timeline.during("write", target.tensor, target.size_bytes):
            return tools.writer.write(target, values)

    def _copy(self, tools: Tools, source: View, target: View) -> Written:
        """Read and write in turn what a core's own cache holds."""
        window, checksum = Window.of(target), 0
        for first in range(0, window.run_bytes, PIECE_BYTES):
            size_bytes = min(PIECE_BYTES, window.run_bytes - first)
            with self.timeline.during("read", source.tensor, size_bytes):
                piece, known = tools.reader.read_piece(source, first)
            with self.timeline.during("write", target.tensor, size_bytes):
                of_piece = tools.writer.write_piece(window.file, piece, window.offset_bytes + first, known)
                checksum = isal_zlib.crc32_combine(checksum, of_piece, size_bytes)
        return window, checksum

    def _noted(self, written: list[Written]) -> list[Written]:
        if written:
            self.journal.wrote(written)
        self.progress.add_progress(sum(window.size_bytes for window, _ in written))
        return written


def _copied_as_is(step: Step) -> dict[int, int]:
    """Writes of bytes that are read for them alone and stay as they are: number of the write -> number of the read."""
    uses = Counter(part.read for wanted in step.writes for part in wanted.parts)
    found = {}
    for number, wanted in enumerate(step.writes):
        first, *others = wanted.parts
        read, target = step.reads[first.read], wanted.target
        stays = read.source.is_dense and read.source.scales is None and not read.add and read.dtype == read.source.dtype
        is_whole = (read.source.rows, read.source.columns) == (target.rows, target.columns) and target.is_dense
        is_alone = not others and uses[first.read] == 1 and read.reader == wanted.writer
        if stays and is_whole and is_alone and read.dtype == target.dtype:
            found[number] = first.read
    return found


def value_overflow(tensor: str, dtype: str, count: int) -> ValueOverflow:
    """The error about so many values of a tensor that become infinite in a dtype."""
    name = next(name for name, target in TARGET_DTYPES.items() if target == dtype)
    return ValueOverflow(
        f"finite values become infinite in {name}",
        tensor=tensor,
        found=f"{counted(count, 'such value')}; the rest was not checked",
        remedy="choose a --target-params-dtype with a wider range and start over with --overwrite, or accept "
        "infinities with --allow-overflow",
    )


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


@dataclass
class MoveResult:
    """What one rank did; `changed` are values that casts changed: one of `CHANGES`, the tensor, how many."""

    seconds: float = 0.0
    read_bytes: int = 0
    written_bytes: int = 0
    gathered_bytes: int = 0
    windows: list[Written] = field(default_factory=list)
    changed: list[tuple[str, str, int]] = field(default_factory=list)


def move(
    task: Task, plan: Plan, world: World, target: Directory, journal: Journal, progress: Control, timeline: Timeline
) -> MoveResult:
    """Do this rank's part of a plan.

    The operating system is asked to begin some reads before they are due: a file system across a network is slow with
    one request in flight.

    Args:
        task, plan, world: the same on every rank, and this rank.
        target: the directory that holds the target files in their final size.
        journal: of this rank, which learns what is finished.
        progress, timeline: hear of every step, and where the time goes.

    Raises:
        SourceError, TargetError: with tensor and file.
        ValueOverflow: in the first block with such a value.
        LostRank, Interrupted: another rank has gone, or a signal has come.
    """
    started = time.perf_counter()
    number, member = plan.group_of(world.rank)
    limit, source, job = limit_of(plan, world), task.source, task.job
    checks, node_bytes = RecordChecks(source.found.checksums), 2 * task.content.moved_bytes * world.local_size
    is_last_use = pushes_others_out(node_bytes // world.size)
    gatherer = make_gatherer(world, plan.groups[number].ranks, limit.send_bytes)
    tools = [
        Tools(
            FileReader(
                source.directory, make_buffer(2 * BLOCK_BYTES), source.found.listing, checks, is_last_use=is_last_use
            ),
            FileWriter(target),
            make_buffer(BLOCK_BYTES),
            Slot(make_buffer(STEP_BYTES), make_buffer(0)),
        )
        for _ in range(limit.threads)
    ]
    result = MoveResult()
    work = Work(member, journal, timeline, progress, job.allow_overflow, result.changed)
    read_ahead = usual_read_ahead(task.source.directory) if job.read_ahead is None else job.read_ahead
    steps = _with_those_ahead(_planned_ahead(steps_of(plan, world.rank)), min(read_ahead, _MOST_AHEAD))
    with ExitStack() as stack:
        for one in tools:
            stack.enter_context(closing(one.reader))
            stack.enter_context(closing(one.writer))
        slots = [
            Slot(make_buffer(STEP_BYTES, world.device), make_buffer(limit.received_bytes, world.device))
            for _ in range(limit.slots)
        ]
        _do_steps(steps, work, tools, slots, gatherer, limit, result)
        tools[0].reader.read_missing()
    for one in tools:
        result.read_bytes += one.reader.read_bytes
        result.written_bytes += one.writer.written_bytes
    result.seconds = time.perf_counter() - started
    return result


def limit_of(plan: Plan, world: World) -> Limits:
    """The sizes of this rank's buffers: threads up to its cores; where ranks gather, as many as were planned."""
    limit = plan.limits[plan.group_of(world.rank)[0]]
    return limit if limit.send_bytes else replace(limit, threads=min(limit.threads, cores_of_rank(world.local_size)))


#: Steps, each with those whose reads are asked for when it is read.
_Steps = Iterator[tuple[Step, Sequence[Step]]]


def _do_steps(
    steps: _Steps,
    work: Work,
    tools: Sequence[Tools],
    slots: Sequence[Slot],
    gatherer: Gatherer | None,
    limit: Limits,
    result: MoveResult,
) -> None:
    """Read, gather and write steps, each while others are in another of these states; each thread has its tools."""
    progress, timeline = work.progress, work.timeline
    idle, free = SimpleQueue[Tools](), list(slots)
    for one in tools:
        idle.put(one)
    moving, writing = deque[Future[list[Written]]](), deque[Future[Slot]]()
    reading = deque[Future[tuple[Step, Slot]]]()
    # Number, step and slot of what is on its way between ranks, and what waits for it.
    gathering = deque[tuple[int, Step, Slot, Callable[[], None]]]()

    ended = Event()

    @contextmanager
    def tools_of_thread() -> Iterator[Tools]:
        mine = idle.get()
        try:
            if ended.is_set():
                raise CancelledError
            yield mine
        finally:
            idle.put(mine)

    def move(step: Step, later: Sequence[Step]) -> list[Written]:
        with tools_of_thread() as mine:
            work.ask(mine.reader, later)
            return work.move(mine, step)

    def read(step: Step, slot: Slot, later: Sequence[Step]) -> tuple[Step, Slot]:
        with tools_of_thread() as mine:
            work.ask(mine.reader, later)
            work.read(mine.reader, step, slot)
            return step, slot

    def write(step: Step, slot: Slot) -> Slot:
        with tools_of_thread() as mine:
            result.windows.extend(work.write(mine, step, slot))
            return slot

    with ThreadPoolExecutor(len(tools), thread_name_prefix="mover") as threads:

        def end_move() -> None:
            progress.doing(f"moving step {number}")
            with timeline.during("wait", f"for step {number}"):
                result.windows += moving.popleft().result()

        def end_gather() -> None:
            number, step, slot, wait = gathering.popleft()
            progress.doing(f"waiting for other ranks in step {number}")
            with timeline.during("gather", f"the rest of step {number}"):
                wait()
            writing.append(threads.submit(write, step, slot))

        def all_are_idle() -> bool:
            ended.set()
            threads.shutdown(wait=False, cancel_futures=True)
            return idle.qsize() == len(tools)

        number, upcoming = 0, next(steps, None)
        try:
            while upcoming or reading or gathering:
                # The first step is alone: a run that meets a fault where one before it did has written nothing then.
                is_alone = number == 0 and bool(reading)
                if upcoming and not is_alone and not upcoming[0].send_bytes:
                    number += 1
                    moving.append(threads.submit(move, *upcoming))
                    upcoming = next(steps, None)
                    # None waits while the first one takes longer.
                    if number == 1 or len(moving) > 2 * len(tools):
                        end_move()
                    continue
                if upcoming and not is_alone and len(reading) < _READING:
                    while writing and writing[0].done():
                        free.append(writing.popleft().result())
                    if not free:  # one is read and one gathered, so another is being written
                        progress.doing(f"writing step {number}")
                        with timeline.during("wait", "for a writer"):
                            free.append(writing.popleft().result())
                    step, later = upcoming
                    # The one that was freed last, as the processor's cache may still have it.
                    reading.append(threads.submit(read, step, free.pop(), later))
                    upcoming = next(steps, None)
                    continue
                if not reading:
                    end_gather()
                    continue
                assert gatherer is not None  # something crosses
                number += 1
                progress.doing(f"reading step {number}")
                with timeline.during("wait", "for a reader"):
                    step, slot = reading.popleft().result()
                progress.doing(f"gathering step {number}")
                passed = messages(step)
                size_bytes = received_bytes(step, passed, work.member, limit)
                with timeline.during("gather", f"step {number}", size_bytes):
                    received = slot.received.tensor[: step.send_bytes * gatherer.members]
                    wait = begin_gather(gatherer, slot.data.tensor[: step.send_bytes], received, passed)
                result.gathered_bytes += size_bytes
                if wait is None:
                    writing.append(threads.submit(write, step, slot))
                    continue
                gathering.append((number, step, slot, wait))
                if len(gathering) > 1:
                    end_gather()
            while moving:
                end_move()
            progress.doing(f"writing step {number}")
            with timeline.during("wait", "for a writer"):
                for future in writing:
                    future.result()
        finally:
            wait_for_end(all_are_idle)


def _planned_ahead(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps, planned more and more at a time: the first ones are waited for."""
    count = 1
    while planned := list(islice(steps, count)):
        yield from planned
        count = min(2 * count, _PLANNED_AHEAD)


def _with_those_ahead(steps: Iterator[Step], count: int) -> _Steps:
    upcoming = deque(islice(steps, max(count, 1)))
    fresh = tuple(upcoming)
    while upcoming:
        step = upcoming.popleft()
        # The step itself once more, before what comes later: of a system that is busy, Linux drops what it is asked.
        yield step, (step, *(one for one in fresh if one is not step)) if count else ()
        fresh = tuple(islice(steps, 1))
        upcoming += fresh
