"""Carries out one rank's steps: read, gather, place and write, each overlapping the others.

A reader thread fills the next slot while the main thread gathers one and a writer thread empties the one before. Only
the main thread takes part in collectives, in the order of the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from dist_convert.move.buffers import CPU, Buffer, Slot, make_buffer, make_slot
from dist_convert.move.exchange import Gatherer, World, all_gather, make_gatherer
from dist_convert.plan.limits import SLOTS
from dist_convert.plan.moves import BLOCK_BYTES
from dist_convert.plan.plan import Plan
from dist_convert.plan.steps import Step, Write
from dist_convert.read.file_reader import TORCH_DTYPES, Counts, FileReader
from dist_convert.write.file_writer import FileWriter


@dataclass
class Moved:
    """What one rank did."""

    written_bytes: int = 0
    gathered_bytes: int = 0
    checksums: list[tuple[str, int, int, int]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


def move(plan: Plan, world: World, source: Path, target: Path, on_written: Callable[[int], None]) -> Moved:
    """Do this rank's part of a plan.

    Args:
        plan: the same on every rank.
        world: this rank.
        source: the iteration's directory as this rank sees it.
        target: the directory that holds the target files in their final size.
        on_written: called with the bytes of each finished step, from the writer thread.

    Raises:
        SourceError, TargetError: with tensor and file.
    """
    number, member = plan.place_of(world.rank)
    team, limit = plan.teams[number], plan.limits[number]
    gatherer = make_gatherer(world, team.ranks, limit.send_bytes)
    gathers_on = world.device if gatherer is not None else CPU
    slots = [make_slot(limit.step_bytes, limit.received_bytes, gathers_on) for _ in range(SLOTS)]
    reader = FileReader(source, make_buffer(2 * BLOCK_BYTES))
    writer = FileWriter(target, keep_checksums=plan.content.sides.to_megatron)
    rows = make_buffer(BLOCK_BYTES)
    moved = Moved(counts=reader.counts, checksums=writer.checksums)

    def read(step: Step, slot: Slot) -> tuple[Step, Slot]:
        for wanted in step.reads:
            if wanted.reader == member:
                reader.read(wanted.source, wanted.dtype, wanted.add, slot.data, wanted.offset_bytes)
        return step, slot

    def write(step: Step, slot: Slot) -> Slot:
        before = writer.written_bytes
        for wanted in step.writes:
            if wanted.writer == member:
                _write(writer, wanted, step, slot, rows)
        on_written(writer.written_bytes - before)
        return slot

    with closing(reader), closing(writer), ThreadPoolExecutor(1) as reads, ThreadPoolExecutor(1) as writes:
        free, reading, writing = list(slots), list[Future[tuple[Step, Slot]]](), list[Future[Slot]]()
        steps = plan.steps(world.rank)
        upcoming = next(steps, None)
        while upcoming is not None or reading:
            if upcoming is not None and not free:
                free.append(writing.pop(0).result())
            if upcoming is not None and len(reading) < SLOTS - 1:
                reading.append(reads.submit(read, upcoming, free.pop()))
                upcoming = next(steps, None)
                continue
            step, slot = reading.pop(0).result()
            if gatherer is not None and step.send_bytes:
                _gather(gatherer, step, slot)
                moved.gathered_bytes += step.send_bytes * gatherer.members
            writing.append(writes.submit(write, step, slot))
        for future in writing:
            future.result()
    moved.written_bytes = writer.written_bytes
    return moved


def _gather(gatherer: Gatherer, step: Step, slot: Slot) -> None:
    received_bytes = step.send_bytes * gatherer.members
    all_gather(gatherer, slot.data.tensor[: step.send_bytes], slot.received.tensor[:received_bytes])


def _write(writer: FileWriter, wanted: Write, step: Step, slot: Slot, rows: Buffer) -> None:
    """Write one window: straight from the buffer where it is one whole read, else with its parts put side by side."""
    buffer = slot.received if step.send_bytes else slot.data
    target = wanted.target
    reads = [step.reads[part.read] for part in wanted.parts]
    starts = [read.reader * step.send_bytes + read.offset_bytes for read in reads]
    if len(reads) == 1 and reads[0].source.columns == target.columns and not target.is_transposed:
        writer.write(target, buffer.memory[starts[0] : starts[0] + target.size_bytes])
        return
    dtype = TORCH_DTYPES[target.dtype]
    values = rows.tensor[: target.size_bytes].view(dtype)
    # A transposed window is written along its columns, which are contiguous in the file.
    matrix = values.view(target.columns, target.rows).T if target.is_transposed else values.view(target.rows, -1)
    column = 0
    for part, read, start in zip(wanted.parts, reads, starts, strict=True):
        packed = buffer.tensor[start : start + read.size_bytes].view(dtype).view(target.rows, -1)
        matrix[:, column : column + part.columns].copy_(packed[:, part.column : part.column + part.columns])
        column += part.columns
    writer.write(target.transposed() if target.is_transposed else target, rows.memory[: target.size_bytes])
