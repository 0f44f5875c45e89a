"""What a rank does in one step: reads, puts side by side what belongs together, and writes."""

from collections.abc import Sequence
from dataclasses import dataclass

from dist_convert.errors import ValueOverflow
from dist_convert.move.timeline import Timeline
from dist_convert.options import TARGET_DTYPES
from dist_convert.plan.steps import Step, Write
from dist_convert.ranks.channel import Control
from dist_convert.read.buffers import Buffer, Slot
from dist_convert.read.file_reader import TORCH_DTYPES, FileReader
from dist_convert.records import View, counted
from dist_convert.write.files import FileWriter, Written
from dist_convert.write.journal import Journal


@dataclass(frozen=True)
class Tools:
    """What a thread works with."""

    reader: FileReader
    writer: FileWriter
    rows: Buffer


@dataclass(frozen=True)
class Work:
    """What is done in a step by this rank, the so manieth of its group; in any thread."""

    member: int
    journal: Journal
    timeline: Timeline
    progress: Control
    may_overflow: bool

    def read(self, reader: FileReader, step: Step, slot: Slot, later: Sequence[Step]) -> None:
        """Read what this rank has to, and ask for what it has to read later."""
        for wanted in (wanted for one in later for wanted in one.reads if wanted.reader == self.member):
            reader.read_ahead(wanted.source)
        for wanted in step.reads:
            if wanted.reader == self.member:
                with self.timeline.during("read", wanted.source.tensor, wanted.source.size_bytes):
                    changed = reader.read(wanted.source, wanted.dtype, wanted.add, slot.data, wanted.offset_bytes)
                if changed.get("overflowed") and not self.may_overflow:
                    raise value_overflow(wanted.source.tensor, wanted.dtype, changed["overflowed"])
                for kind, values in changed.items():
                    self.journal.changed(kind, wanted.source, values)

    def write(self, tools: Tools, step: Step, slot: Slot) -> list[Written]:
        """Place and write what this rank has to."""
        before = tools.writer.written_bytes
        written = []
        for wanted in step.writes:
            if wanted.writer == self.member:
                with self.timeline.during("place", wanted.target.tensor, wanted.target.size_bytes):
                    target, values = _placed(wanted, step, slot, tools.rows)
                with self.timeline.during("write", target.tensor, target.size_bytes):
                    written.append(tools.writer.write(target, values))
        if written:
            self.journal.wrote(written)
        self.progress.add_progress(tools.writer.written_bytes - before)
        return written


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
