"""Tensors that are stored in chunks, each a box of the tensor with a place of its own, and the regions they make up."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from dist_convert.errors import CorruptFile
from dist_convert.models.catalog import Region, from_neighbours
from dist_convert.read.dcp import METADATA_FILE
from dist_convert.records import DTYPE_BYTES, Box, StoredTensor, View, cover_fault, row_major


@dataclass(frozen=True)
class StoredChunk:
    """A box of a stored tensor, by its first element in every dimension, and where its elements lie."""

    offsets: tuple[int, ...]
    place: StoredTensor


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint: the safetensors name of its dtype, its shape, and its chunks.

    `head_dim` are the rows of a head, of a matrix whose heads have their rows in Meta's order; 0 for all others.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]
    head_dim: int = 0

    @property
    def whole(self) -> StoredTensor:
        """The tensor as if all of it were stored row after row."""
        file = self.chunks[0].place.file if self.chunks else METADATA_FILE
        return StoredTensor(self.key, file, self.dtype, self.shape, row_major(self.shape), 0)

    @cached_property
    def _entries(self) -> Mapping[int, "Stored"]:
        """What lies at each index of the first axis: of layers or experts, a chunk may hold several."""
        parts: dict[int, list[StoredChunk]] = {}
        for chunk in self.chunks:
            (first, *rest), place = chunk.offsets, chunk.place
            step_bytes, lines = place.strides[0] * DTYPE_BYTES[self.dtype], (place.shape[1:], place.strides[1:])
            for number in range(place.shape[0]):
                offset_bytes = place.offset_bytes + number * step_bytes
                part = StoredTensor(place.name, place.file, self.dtype, *lines, offset_bytes)
                parts.setdefault(first + number, []).append(StoredChunk(tuple(rest), part))
        return {number: self._entry(number, chunks) for number, chunks in parts.items()}

    def _entry(self, number: int, chunks: Sequence[StoredChunk]) -> "Stored":
        return Stored(chunk_name(self.key, [number]), self.dtype, self.shape[1:], tuple(chunks))

    def at(self, index: Sequence[int]) -> "Stored":
        """What lies at an index of the leading axes, as a tensor of its own."""
        found = self
        for number in index:
            found = found._entries.get(number) or found._entry(number, ())
        return found

    def pieces(self) -> Iterator[tuple[int, int, View]]:
        """First row, first column and place of each chunk of a matrix or vector.

        Raises:
            CorruptFile: they do not make it up.
        """
        boxes = []
        for chunk in self.chunks:
            view = View.of(chunk.place)
            row, column = (*chunk.offsets, 0)[:2]
            boxes.append(Box(row, column, view.rows, view.columns))
            yield row, column, view
        fault = cover_fault(boxes, *(*self.shape, 1)[:2])
        if fault is not None:
            file = self.whole.file
            what, expected = "the chunks do not make up a tensor exactly", f"chunks that cover {list(self.shape)} once"
            raise CorruptFile(what, file, expected, found=fault, tensor=self.key)

    def regions(self, view: View) -> tuple[Region, ...]:
        """Where a window of `whole` lies."""
        rows, columns = (*self.shape, 1)[:2] if len(self.shape) < 3 else self.shape[-2:]
        is_turned = view.row_stride % columns > 0
        seen = view.transposed() if is_turned else view
        first, column = divmod(view.offset_bytes // DTYPE_BYTES[self.dtype], columns)
        matrix, row = divmod(first, rows)
        row_step, column_step = max(1, seen.row_stride // columns), seen.column_stride
        found = []
        for top, left, piece in self.at((matrix,) if len(self.shape) == 3 else ()).pieces():
            down = _inside(range(row, row + row_step * seen.rows, row_step), top, piece.rows)
            right = _inside(range(column, column + column_step * seen.columns, column_step), left, piece.columns)
            if down and right:
                part = piece.window(Box(down[0] - top, right[0] - left, len(down), len(right)))
                row_stride, column_stride = part.row_stride * row_step, part.column_stride * column_step
                part = replace(part, row_stride=row_stride, column_stride=column_stride)
                box = Box((down[0] - row) // row_step, (right[0] - column) // column_step, len(down), len(right))
                if is_turned:
                    box, part = Box(box.column, box.row, box.columns, box.rows), part.transposed()
                found.append(Region(box, (part,)))
        if self.head_dim:
            return from_neighbours(found, self.head_dim)
        return tuple(sorted(found, key=lambda region: (region.box.row, region.box.column)))


def _inside(numbers: range, first: int, count: int) -> range:
    """Those of ascending numbers that lie among `count` from the first on."""
    start, end = (max(0, -((numbers.start - border) // numbers.step)) for border in (first, first + count))
    return numbers[start:end]


def chunk_name(key: str, offsets: Sequence[int]) -> str:
    """What messages call a chunk, or what lies at an index of the leading axes."""
    return f"{key}{list(offsets)}" if offsets else key
