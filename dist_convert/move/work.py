"""What a rank does in one step: reads, puts side by side what belongs together, and writes."""

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass

from isal import isal_zlib

from dist_convert.errors import ValueOverflow
from dist_convert.move.timeline import Timeline
from dist_convert.options import TARGET_DTYPES
from dist_convert.plan.steps import Step, Write
from dist_convert.ranks.channel import Control
from dist_convert.read.buffers import Buffer, Slot
from dist_convert.read.file_reader import PIECE_BYTES, TORCH_DTYPES, FileReader
from dist_convert.records import View, Window, counted
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
    """What this rank does in a step, in any thread; `member` is its position in its group."""

    member: int
    journal: Journal
    timeline: Timeline
    progress: Control
    may_overflow: bool

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

    def write(self, tools: Tools, step: Step, slot: Slot) -> list[Written]:
        """Place and write what this rank has to."""
        mine = [wanted for wanted in step.writes if wanted.writer == self.member]
        return self._noted([self._write(tools, wanted, step, slot) for wanted in mine])

    def move(self, tools: Tools, step: Step, slot: Slot) -> list[Written]:
        """All of a step that needs no other rank."""
        copied = _copied_as_is(step)
        self.read(tools.reader, step, slot, but=copied.values())
        written = [
            self._copy(tools, step.reads[copied[number]].source, wanted.target)
            if number in copied
            else self._write(tools, wanted, step, slot)
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
