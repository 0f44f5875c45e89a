"""The files of a distributed checkpoint before any data, and what completes them: blobs, checksums, `.metadata`."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from dist_convert.formats.dcp.chunks import Stored, StoredChunk, chunk_name
from dist_convert.formats.dcp.pickled_metadata import metadata_bytes
from dist_convert.formats.pickles import pickled
from dist_convert.formats.saved import Container, SavedTensor, lay_out_container
from dist_convert.read.dcp import METADATA_FILE, SUFFIX, Blob, Chunk
from dist_convert.read.dcp import SavedTensor as ListedTensor
from dist_convert.records import DTYPE_BYTES, StoredTensor, TargetFile, TensorSpec, row_major
from dist_convert.write.checksums import KnownRanges, ZipRecord, write_record_checksums
from dist_convert.write.files import Directory, make_file, write_file

#: Chunks of this size begin on a page, as direct reads and writes of them want it.
_LARGE_BYTES, _PAGE_BYTES = 1 << 20, 4096


@dataclass(frozen=True)
class PlannedBlob:
    """A box of a tensor, or an empty object, whose dtype is "" and whose box nothing."""

    key: str
    dtype: str
    chunk: Chunk


def _blob(dtype: str, sizes: tuple[int, ...]) -> Container:
    """What `torch.save` makes of a contiguous tensor, or of the empty state that modules without state have."""
    if not dtype:
        return lay_out_container(pickled([None]), [])
    tensor = SavedTensor(0, dtype, sizes)
    return lay_out_container(pickled(tensor.rebuilt()), [tensor.size_bytes])


@dataclass(frozen=True)
class PlannedFiles:
    """All files, which `add` fills.

    Attributes:
        sizes_bytes: of each file.
        blobs: of each file, in its order.
        shapes: of each tensor, by its key.
        templates: blobs that begin at byte 0, by dtype and sizes.
    """

    sizes_bytes: dict[str, int] = field(default_factory=dict)
    blobs: dict[str, list[PlannedBlob]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    templates: dict[tuple[str, tuple[int, ...]], Container] = field(default_factory=dict)

    def add(
        self, file: str, key: str, dtype: str = "", offsets: tuple[int, ...] = (), sizes: tuple[int, ...] = ()
    ) -> None:
        """Place a box of a tensor, or an empty object, behind what a file has."""
        if (dtype, sizes) not in self.templates:
            self.templates[dtype, sizes] = _blob(dtype, sizes)
        template, first_byte = self.templates[dtype, sizes], self.sizes_bytes.get(file, 0)
        if template.storages and template.storages[0].size_bytes >= _LARGE_BYTES:
            first_byte += -(first_byte + template.storages[0].start_bytes) % _PAGE_BYTES
        self.sizes_bytes[file] = first_byte + template.size_bytes
        chunk = Chunk(offsets, sizes, Blob(file, first_byte, template.size_bytes))
        self.blobs.setdefault(file, []).append(PlannedBlob(key, dtype, chunk))

    def target_files(self) -> tuple[TargetFile, ...]:
        """Each file with the tensors that it will hold: its chunks."""
        return tuple(map(self._target_file, sorted(self.sizes_bytes)))

    def _target_file(self, name: str) -> TargetFile:
        places = tuple(self._place(blob) for blob in self.blobs[name] if blob.dtype)
        return TargetFile(name, b"", self.sizes_bytes[name], places)

    def _record(self, box: PlannedBlob) -> ZipRecord:
        [record] = self.templates[box.dtype, box.chunk.sizes].storages
        return record.moved(box.chunk.blob.offset_bytes)

    def _place(self, box: PlannedBlob) -> StoredTensor:
        """Where the elements of a box will lie."""
        name, sizes = chunk_name(box.key, box.chunk.offsets), box.chunk.sizes
        place = row_major(sizes), self._record(box).start_bytes
        return StoredTensor(name, box.chunk.blob.file, box.dtype, sizes, *place)

    def stored(self) -> dict[str, Stored]:
        """Each tensor and where it will lie, by its key."""
        found = {}
        for key, boxes in self._boxes().items():
            chunks = tuple(StoredChunk(box.chunk.offsets, self._place(box)) for box in boxes)
            found[key] = Stored(key, boxes[0].dtype, self.shapes[key], chunks)
        return found

    def _boxes(self) -> dict[str, list[PlannedBlob]]:
        """The boxes of each tensor."""
        boxes: dict[str, list[PlannedBlob]] = {key: [] for key in self.shapes}
        for box in (blob for blobs in self.blobs.values() for blob in blobs if blob.dtype):
            boxes[box.key].append(box)
        return boxes

    def make(self, partial: Directory, files: Iterable[TargetFile]) -> None:
        """Make some files with all that is no tensor's values."""
        for file in files:
            make_file(partial, file.name, self._pieces(file.name), file.size_bytes)

    def _pieces(self, file: str) -> Iterator[tuple[int, bytes]]:
        for blob in self.blobs[file]:
            pieces = self.templates[blob.dtype, blob.chunk.sizes].pieces
            yield from ((blob.chunk.blob.offset_bytes + at, piece) for at, piece in pieces)

    def write_checksums(self, partial: Directory, files: Iterable[TargetFile], known: KnownRanges) -> None:
        """Write the checksum of each chunk of some files to both places that hold it."""
        for name in (file.name for file in files):
            chunks = (self._record(blob) for blob in self.blobs[name] if blob.dtype)
            write_record_checksums(partial, name, self.sizes_bytes[name], chunks, known.get(name, ()))

    def write_metadata(self, partial: Directory, *, has_paths: bool = False) -> None:
        """Write `.metadata`; see `metadata_bytes`."""
        tensors = {
            key: ListedTensor(boxes[0].dtype, self.shapes[key], tuple(box.chunk for box in boxes))
            for key, boxes in self._boxes().items()
        }
        objects = {blob.key: blob.chunk.blob for blobs in self.blobs.values() for blob in blobs if not blob.dtype}
        write_file(partial, METADATA_FILE, metadata_bytes(tensors, objects, has_paths=has_paths))


#: Loading reads whole chunks, whatever part of them it needs.
_CHUNK_BYTES = 16 << 20


def lay_out_chunks(specs: Iterable[TensorSpec], max_shard_size_bytes: int) -> PlannedFiles:
    """Cut tensors into chunks of whole rows, and fill files with them, a new one where the next chunk would exceed the
    size; sizes count the tensors' bytes."""
    planned = PlannedFiles()
    number = filled = 0
    for key, dtype, shape in specs:
        planned.shapes[key] = shape
        row_bytes = DTYPE_BYTES[dtype] * math.prod(shape[1:])
        most = max(1, min(_CHUNK_BYTES, max_shard_size_bytes) // row_bytes)
        for first in range(0, shape[0], most):
            rows = min(most, shape[0] - first)
            if filled and filled + rows * row_bytes > max_shard_size_bytes:
                number, filled = number + 1, 0
            filled += rows * row_bytes
            offsets = (first, *(0 for _ in shape[1:]))
            planned.add(f"__{number}_0{SUFFIX}", key, dtype, offsets, (rows, *shape[1:]))
    return planned
