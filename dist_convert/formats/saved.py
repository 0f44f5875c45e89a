"""What `torch.save` writes, with holes in place of the storages, and without torch.

The container is laid out as torch 2.13 does, and the pickle has no memo: the same bytes with every version of Python
and torch. Keys: docs/formats.md, "Keys of the file"; container: docs/formats.md, "Storages"; headers: PKWARE's
APPNOTE.TXT, 4.3.7 (local), 4.3.9 (data descriptor), 4.3.12 (central directory) and 4.3.14 to 4.3.16 (its end).
"""

import itertools
import math
import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dist_convert.errors import PlanError
from dist_convert.formats.megatron.target_args import is_torch_dtype
from dist_convert.formats.pickles import Called, Instance, Named, Reference
from dist_convert.records import DTYPE_BYTES, row_major
from dist_convert.write.checksums import ZipRecord

CHECKPOINT_VERSION = 3.0

#: Offset in bytes and content of what is no storage's data.
Pieces = tuple[tuple[int, bytes], ...]

#: torch's storage classes by safetensors dtype; the other dtypes have none, and lie in untyped storages.
_STORAGES = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage",
    "BOOL": "BoolStorage", "C64": "ComplexFloatStorage", "C128": "ComplexDoubleStorage",
}  # fmt: skip
_UNTYPED = {
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "U64": "uint64", "U32": "uint32", "U16": "uint16",
}  # fmt: skip


@dataclass(frozen=True)
class SavedTensor:
    """A contiguous tensor that fills record `data/{key}`; `dtype` is its safetensors name."""

    key: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def strides(self) -> tuple[int, ...]:
        return row_major(self.shape)

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def rebuilt(self) -> Called:
        """As torch pickles its tensors: storage, offset, shape, strides, requires_grad, backward hooks."""
        layout = (0, self.shape, self.strides, False, OrderedDict[str, object]())
        if self.dtype in _UNTYPED:
            storage = self._storage(Named("torch.storage", "UntypedStorage"), self.size_bytes)
            dtype = Named("torch", _UNTYPED[self.dtype])
            return Called(Named("torch._utils", "_rebuild_tensor_v3"), (storage, *layout, dtype))
        storage = self._storage(Named("torch", _STORAGES[self.dtype]), math.prod(self.shape))
        return Called(Named("torch._utils", "_rebuild_tensor_v2"), (storage, *layout))

    def _storage(self, kind: Named, elements: int) -> Reference:
        return Reference(("storage", kind, str(self.key), "cpu", elements))


def common_content(args: Mapping[str, object], iteration: int, file: str) -> dict[str, object]:
    """What a file of Megatron holds beside the model; the order of `args` has no part in it.

    They may hold None, bool, int, float, str, torch's dtypes, and lists, tuples and dicts of these.

    Raises:
        PlanError: a value of another kind; `file` is how messages name where it would be.
    """
    for name, value in args.items():
        if not _is_plain(value):
            what = f"argument {name!r} cannot be written to a checkpoint"
            expected = "None, bool, int, float, str, a torch dtype, or lists, tuples and dicts of these"
            raise PlanError(what, file, expected, found=f"{value!r} of type {type(value).__name__}")
    namespace = Instance(Named("argparse", "Namespace"), dict(sorted(args.items())))
    return {"args": namespace, "checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration}


def _is_plain(value: object) -> bool:
    """Exact types only: what derives from them (an enum, a numpy scalar) would lose its class."""
    if type(value) is list or type(value) is tuple:
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, itertools.chain(value, value.values())))
    return is_torch_dtype(value) or value is None or type(value) in (bool, int, float, str)


@dataclass(frozen=True)
class Container:
    """A file of torch before any storage's data.

    Attributes:
        pieces: all that is no storage's data.
        size_bytes: of the whole file.
        storages: where each one's data goes.
    """

    pieces: Pieces
    size_bytes: int
    storages: tuple[ZipRecord, ...]


def lay_out_container(pickled: bytes, sizes_bytes: Sequence[int]) -> Container:
    """The records of `torch.save` in its order, without memory for storages' data, which are of so many bytes each."""
    archive = _Archive()
    archive.add("data.pkl", pickled)
    archive.add(".format_version", b"1")
    archive.add(".storage_alignment", b"64")
    archive.add("byteorder", b"little")
    storages = [archive.add(f"data/{key}", size_bytes) for key, size_bytes in enumerate(sizes_bytes)]
    archive.add("version", b"3\n")
    # torch's follows from hashes that each C++ library has its own of; nothing but its log of loaded files looks at it.
    archive.add(".data/serialization_id", b"%040d" % zlib.crc32(pickled))
    directory_bytes = archive.size_bytes
    archive.write_directory()
    pieces = tuple((start, bytes(piece)) for start, piece in archive.pieces)
    records = (replace(storage, header_bytes=directory_bytes + storage.header_bytes) for storage in storages)
    return Container(pieces, archive.size_bytes, tuple(records))


_LOCAL, _CENTRAL, _END = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s4H2IH")
_END_64, _LOCATOR = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
#: Names in UTF-8; and sizes and checksum behind the data.
_UTF8, _HAS_DESCRIPTOR = 0x800, 0x8
#: Sizes and offsets from here on are 64 bits long, and elsewhere.
_MAX_32, _MAX_16 = 0xFFFFFFFF, 0xFFFF
_ALIGNMENT_BYTES = 64


class _Archive:
    """A zip file: what is written, and where, with holes."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytearray]] = [(0, bytearray())]
        self._directory = bytearray()
        self._records = 0

    @property
    def size_bytes(self) -> int:
        start, piece = self.pieces[-1]
        return start + len(piece)

    def add(self, name: str, content: bytes | int) -> ZipRecord:
        """Add a record, or one with a hole of so many bytes; its header's place counts from the directory's."""
        size_bytes = content if isinstance(content, int) else len(content)
        path, header_bytes, directory_bytes = f"archive/{name}".encode(), self.size_bytes, len(self._directory)
        far = (header_bytes,) if header_bytes >= _MAX_32 else ()
        is_large = size_bytes >= _MAX_32
        long = _long_numbers((size_bytes, 0, *far) if is_large else far)
        padding = -(header_bytes + _LOCAL.size + len(path) + len(long) + 4) % _ALIGNMENT_BYTES
        long_and_padding = long + b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        flags = _UTF8 | (_HAS_DESCRIPTOR if size_bytes else 0)
        self._write(_LOCAL.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(path), len(long_and_padding)))
        self._write(path + long_and_padding)
        start, checksum = self.size_bytes, 0
        if isinstance(content, bytes):
            self._write(content)
            checksum = zlib.crc32(content)
        elif content:
            self.pieces.append((start + content, bytearray()))
        if size_bytes:
            self._write(struct.pack("<4sI2Q" if long else "<4s3I", b"PK\7\x08", checksum, size_bytes, size_bytes))
        long = _long_numbers((size_bytes, size_bytes, *far) if is_large else far)
        short_bytes = min(size_bytes, _MAX_32)
        self._directory += _CENTRAL.pack(
            b"PK\1\2", 0, 0, flags, 0, 0, 0, checksum, short_bytes, short_bytes, len(path), len(long), 0, 0, 0, 0,
            min(header_bytes, _MAX_32),
        )  # fmt: skip
        self._directory += path + long
        self._records += 1
        return ZipRecord(start, start + size_bytes, directory_bytes)

    def write_directory(self) -> None:
        """Write what ends the file."""
        start, size_bytes, count = self.size_bytes, len(self._directory), self._records
        self._write(self._directory)
        end_bytes, short_count = self.size_bytes, min(count, _MAX_16)
        self._write(_END_64.pack(b"PK\6\6", _END_64.size - 12, 0x31E, 45, 0, 0, count, count, size_bytes, start))
        self._write(_LOCATOR.pack(b"PK\6\7", 0, end_bytes, 1))
        short_bytes, short_start = min(size_bytes, _MAX_32), min(start, _MAX_32)
        self._write(_END.pack(b"PK\5\6", 0, 0, short_count, short_count, short_bytes, short_start, 0))

    def _write(self, data: bytes | bytearray) -> None:
        self.pieces[-1][1].extend(data)


def _long_numbers(numbers: tuple[int, ...]) -> bytes:
    """The field for 64 bit sizes and offsets (APPNOTE.TXT, 4.5.3); nothing for none."""
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
