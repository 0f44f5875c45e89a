"""Carries out one rank's steps: read, gather, place and write, each overlapping the others.

A reader thread fills the next slot while the main thread gathers one and a writer thread empties the one before. Only
the main thread takes part in collectives, in the order of the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dist_convert.move.buffers import Buffer, Slot, make_buffer, make_slot
from dist_convert.move.exchange import Gatherer, World, all_gather, make_gatherer
from dist_convert.plan.limits import SLOTS
from dist_convert.plan.moves import BLOCK_BYTES
from dist_convert.plan.plan import Plan
from dist_convert.plan.steps import PlacedBlock, Step
from dist_convert.read.file_reader import TORCH_DTYPES, Counts, FileReader
from dist_convert.records import View
from dist_convert.write.file_writer import FileWriter


@dataclass
class Moved:
    """What one rank did."""

    written_bytes: int = 0
    gathered_bytes: int = 0
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
    slots = [make_slot(limit.step_bytes, limit.received_bytes) for _ in range(SLOTS)]
    reader = FileReader(source, make_buffer(2 * BLOCK_BYTES))
    writer = FileWriter(target)
    rows = make_buffer(BLOCK_BYTES)
    moved = Moved(counts=reader.counts)

    def read(step: Step, slot: Slot) -> tuple[Step, Slot]:
        for block in step.blocks:
            for piece in block.pieces:
                if piece.reader == member:
                    dtype = piece.copy.targets[0].dtype
                    reader.read(piece.source, dtype, piece.copy.add, slot.data, piece.offset_bytes)
        return step, slot

    def write(step: Step, slot: Slot) -> Slot:
        before = writer.written_bytes
        for block in step.blocks:
            if block.writer == member:
                _write_block(writer, block, slot, step.send_bytes, rows)
        on_written(writer.written_bytes - before)
        return slot

    with ThreadPoolExecutor(1, "reader") as reads, ThreadPoolExecutor(1, "writer") as writes:
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
    reader.close()
    writer.close()
    moved.written_bytes = writer.written_bytes
    return moved


def _gather(gatherer: Gatherer, step: Step, slot: Slot) -> None:
    received_bytes = step.send_bytes * gatherer.members
    all_gather(gatherer, slot.data.tensor[: step.send_bytes], slot.received.tensor[:received_bytes])


def _write_block(writer: FileWriter, block: PlacedBlock, slot: Slot, send_bytes: int, rows: Buffer) -> None:
    """Write one block: as it is where it has one piece, else with its pieces put side by side first."""
    buffer = slot.received if send_bytes else slot.data
    starts = [piece.reader * send_bytes + piece.offset_bytes for piece in block.pieces]
    first = block.pieces[0].copy.targets[0]
    if len(block.pieces) == 1:
        writer.write(first, buffer.memory[starts[0] : starts[0] + first.size_bytes])
        return
    columns = sum(piece.copy.columns for piece in block.pieces)
    dtype = TORCH_DTYPES[first.dtype]
    whole = View(first.file, first.tensor, first.dtype, first.offset_bytes, first.rows, columns, first.row_stride, 1)
    matrix = rows.tensor[: whole.size_bytes].view(dtype).view(first.rows, columns)
    column = 0
    for piece, start in zip(block.pieces, starts, strict=True):
        packed = buffer.tensor[start : start + piece.size_bytes].view(dtype)
        matrix[:, column : column + piece.copy.columns].copy_(packed.view(first.rows, piece.copy.columns))
        column += piece.copy.columns
    writer.write(whole, rows.memory[: whole.size_bytes])
