"""The files of a distributed checkpoint before any data, and what completes them: blobs, checksums, `.metadata`."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dist_convert.errors import PlanError
from dist_convert.formats.dcp.chunks import Stored, StoredChunk, chunk_name
from dist_convert.formats.dcp.pickled_metadata import metadata_bytes
from dist_convert.formats.saved import Pieces, SavedTensor, lay_out_container, pickled
from dist_convert.read.dcp import METADATA_FILE, SUFFIX, Blob, Chunk
from dist_convert.read.dcp import SavedTensor as ListedTensor
from dist_convert.records import DTYPE_BYTES, StoredTensor, TargetFile, TensorSpec, row_major
from dist_convert.write.checksums import KnownRange, checksum_of
from dist_convert.write.files import make_file, opened, write_file, writing

#: Chunks of this size begin on a page, as direct reads and writes of them want it.
_LARGE_BYTES, _PAGE_BYTES = 1 << 20, 4096
_CENTRAL_HEADER, _CENTRAL_CRC, _CENTRAL_NAME = b"PK\x01\x02", 16, 46
_DESCRIPTOR, _DESCRIPTOR_CRC = b"PK\x07\x08", 4


@dataclass(frozen=True)
class Template:
    """A blob that begins at byte 0: all of it that is no value, and where values and their checksum go, in bytes.

    `checksums` is empty for an object, which has no values.
    """

    pieces: Pieces
    size_bytes: int
    data_offset_bytes: int
    data_bytes: int
    checksums: tuple[int, ...]


@dataclass(frozen=True)
class PlannedBlob:
    """A box of a tensor, or an empty object, whose dtype is "" and whose box nothing."""

    key: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Blob


def _chunk_template(dtype: str, sizes: tuple[int, ...]) -> Template:
    """What `torch.save` makes of a contiguous tensor."""
    tensor = SavedTensor(0, dtype, sizes)
    pieces, size_bytes, [data_offset_bytes] = lay_out_container(pickled(tensor), [tensor.size_bytes])
    end_bytes = data_offset_bytes + tensor.size_bytes
    start, tail = pieces[-1]
    central = tail.rfind(b"archive/data/0") - _CENTRAL_NAME
    descriptor = end_bytes - start
    found = tail[descriptor : descriptor + 4], tail[central : central + 4]
    if found != (_DESCRIPTOR, _CENTRAL_HEADER):
        expected = (_DESCRIPTOR, _CENTRAL_HEADER)
        raise PlanError("torch lays out a saved tensor in another way", expected=expected, found=found)
    checksums = (end_bytes + _DESCRIPTOR_CRC, start + central + _CENTRAL_CRC)
    return Template(pieces, size_bytes, data_offset_bytes, tensor.size_bytes, checksums)


def _object_template() -> Template:
    """What `torch.save` makes of the empty state that modules without state have."""
    pieces, size_bytes, _ = lay_out_container(pickled([None]), [])
    return Template(pieces, size_bytes, 0, 0, ())


@dataclass(frozen=True)
class PlannedFiles:
    """All files, which `add` fills.

    Attributes:
        sizes_bytes: of each file.
        blobs: of each file, in its order.
        shapes: of each tensor, by its key.
        templates: by dtype and sizes.
    """

    sizes_bytes: dict[str, int] = field(default_factory=dict)
    blobs: dict[str, list[PlannedBlob]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    templates: dict[tuple[str, tuple[int, ...]], Template] = field(default_factory=dict)

    def add(
        self, file: str, key: str, dtype: str = "", offsets: tuple[int, ...] = (), sizes: tuple[int, ...] = ()
    ) -> None:
        """Place a box of a tensor, or an empty object, behind what a file has."""
        if (dtype, sizes) not in self.templates:
            self.templates[dtype, sizes] = _chunk_template(dtype, sizes) if dtype else _object_template()
        template, first_byte = self.templates[dtype, sizes], self.sizes_bytes.get(file, 0)
        if template.data_bytes >= _LARGE_BYTES:
            first_byte += -(first_byte + template.data_offset_bytes) % _PAGE_BYTES
        self.sizes_bytes[file] = first_byte + template.size_bytes
        place = Blob(file, first_byte, template.size_bytes)
        self.blobs.setdefault(file, []).append(PlannedBlob(key, dtype, offsets, sizes, place))

    def target_files(self) -> tuple[TargetFile, ...]:
        """Each file with the tensors that it will hold: its chunks."""
        return tuple(map(self._target_file, sorted(self.sizes_bytes)))

    def _target_file(self, name: str) -> TargetFile:
        places = tuple(self._place(blob) for blob in self.blobs[name] if blob.dtype)
        return TargetFile(name, b"", self.sizes_bytes[name], places)

    def _place(self, box: PlannedBlob) -> StoredTensor:
        """Where the elements of a box will lie."""
        offset_bytes = box.place.offset_bytes + self.templates[box.dtype, box.sizes].data_offset_bytes
        name = chunk_name(box.key, box.offsets)
        return StoredTensor(name, box.place.file, box.dtype, box.sizes, row_major(box.sizes), offset_bytes)

    def stored(self) -> dict[str, Stored]:
        """Each tensor and where it will lie, by its key."""
        found = {}
        for key, boxes in self._boxes().items():
            chunks = tuple(StoredChunk(box.offsets, self._place(box)) for box in boxes)
            found[key] = Stored(key, boxes[0].dtype, self.shapes[key], chunks)
        return found

    def _boxes(self) -> dict[str, list[PlannedBlob]]:
        """The boxes of each tensor."""
        boxes: dict[str, list[PlannedBlob]] = {key: [] for key in self.shapes}
        for box in (blob for blobs in self.blobs.values() for blob in blobs if blob.dtype):
            boxes[box.key].append(box)
        return boxes

    def make(self, partial: Path, files: Iterable[TargetFile]) -> None:
        """Make some files with all that is no tensor's values."""
        for file in files:
            make_file(partial, file.name, self._pieces(file.name), file.size_bytes)

    def _pieces(self, file: str) -> Iterator[tuple[int, bytes]]:
        for blob in self.blobs[file]:
            pieces = self.templates[blob.dtype, blob.sizes].pieces
            yield from ((blob.place.offset_bytes + at, piece) for at, piece in pieces)

    def write_checksums(
        self, partial: Path, files: Iterable[TargetFile], known: Mapping[str, Sequence[KnownRange]]
    ) -> None:
        """Write the checksum of each chunk of some files to both places that hold it."""
        for name in (file.name for file in files):
            with writing(partial / name), opened(partial, name, os.O_RDWR) as descriptor:
                for chunk in (blob for blob in self.blobs[name] if blob.dtype):
                    template, first_byte = self.templates[chunk.dtype, chunk.sizes], chunk.place.offset_bytes
                    start = first_byte + template.data_offset_bytes
                    end = start + template.data_bytes
                    checksum = checksum_of(descriptor, name, start, end, known.get(name, ()))
                    for place in template.checksums:
                        os.pwrite(descriptor, checksum.to_bytes(4, "little"), first_byte + place)

    def write_metadata(self, partial: Path, *, has_paths: bool = False) -> None:
        """Write `.metadata`; see `metadata_bytes`."""
        tensors = {
            key: ListedTensor(
                boxes[0].dtype, self.shapes[key], tuple(Chunk(b.offsets, b.sizes, b.place) for b in boxes)
            )
            for key, boxes in self._boxes().items()
        }
        objects = {blob.key: blob.place for blobs in self.blobs.values() for blob in blobs if not blob.dtype}
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
