"""What `torch.save` wrote into a file: its zip container, the saved object, and where its tensors lie.

Only the central directory and single local headers are read, never a record's data (except the pickle, on request).
Format: https://docs.pytorch.org/docs/stable/notes/serialization.html and PKWARE's APPNOTE.TXT; storages:
docs/formats.md, "Storages".
"""

import hashlib
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dist_convert.errors import CorruptFile, UnsupportedModel
from dist_convert.read.restricted_pickle import Tensor, class_of, load
from dist_convert.read.source import opened_source
from dist_convert.records import DTYPE_BYTES, StoredTensor, human_bytes, names

#: A pickle of args, optimizer groups and a few hundred thousand tensor records stays far below this.
MAX_PICKLE_BYTES = 256 << 20
#: Of some two hundred thousand records, each of which takes ten times as much in memory.
_MAX_DIRECTORY_BYTES = 16 << 20
#: Encrypted, patch data, strong encryption (APPNOTE.TXT, 4.4.4).
_FOREIGN_FLAGS = 0x61
#: What is read at once of a container's end: all of it and of the directory, where a few records are listed.
_TAIL_BYTES = 1024
#: Of a local header, its signature and the lengths of name and extra fields; of one in the directory, what `_Entry`
#: has; of the directory's end, with and without 64 bits, signature, size, offset and in the latter the comment's length
#: (APPNOTE.TXT, 4.3.7, 4.3.12, 4.3.14 and 4.3.16).
_LOCAL_HEADER, _HEADER = struct.Struct("<4s10xI8x2H"), struct.Struct("<4s4x2H4x3I3H8xI")
_LONG_END, _END = struct.Struct("<4s36x2Q"), struct.Struct("<4s8x2IH")
_LOCATOR_BYTES = 20
#: A size or offset that is told elsewhere, in 64 bits.
_ELSEWHERE = 0xFFFFFFFF


@dataclass(frozen=True)
class Record:
    """One stored record.

    Attributes:
        header_offset_bytes: of its local header in the file.
        size_bytes: of its data.
        limit_bytes: where in the file the next local header or the directory begins; its data ends before.
        path: its name in the local header.
        checksum: CRC-32 of its data by the directory; 0 where nobody has worked it out.
    """

    header_offset_bytes: int
    size_bytes: int
    limit_bytes: int
    path: bytes
    checksum: int


@dataclass(frozen=True)
class Container:
    """The records of an open `.pt` file, or of one that is a stretch of a larger file.

    Attributes:
        file: that holds it.
        label: how messages name the file.
        size_bytes: of the container.
        records: by name without the archive's folder.
    """

    file: BinaryIO
    label: str
    size_bytes: int
    records: dict[str, Record]


def open_container(file: BinaryIO, label: str, first_byte: int = 0, size_bytes: int | None = None) -> Container:
    """List the records of a `.pt` file after checking that they are stored, in bounds and do not overlap.

    Args:
        file, label: see `Container`.
        first_byte, size_bytes: the stretch of the file that it is; without a size, all that follows.

    Raises:
        CorruptFile: not a zip, cut short, or with entries that torch never writes.
    """
    if size_bytes is None:
        size_bytes = file.seek(0, os.SEEK_END) - first_byte
    try:
        directory_offset_bytes, directory = _read_directory(file, first_byte, size_bytes)
        entries = sorted(_entries(directory))
    except (ValueError, struct.error) as error:
        expected = "the zip container of torch.save (torch 1.6 or newer)"
        found = f"{error}, in {size_bytes} bytes"
        remedy = "copy the file again; if it was saved in the old format, load and save it with a current torch"
        raise CorruptFile("not a complete torch checkpoint file", label, expected, found, remedy) from error
    records = {}
    limits = [*(entry[0] for entry in entries[1:]), directory_offset_bytes]
    for (offset, size, stored, compression, flags, path, checksum), limit in zip(entries, limits, strict=False):
        name = path.partition(b"/")[2].decode("latin-1")  # those of torch are ASCII
        is_foreign = compression or stored != size or flags & _FOREIGN_FLAGS
        if is_foreign or offset + _LOCAL_HEADER.size + size > limit or name in records:
            what = f"zip entry {path.decode('latin-1')!r} is not one that torch writes"
            expected = f"stored, unencrypted, named once, inside bytes {offset}..{limit}"
            found = f"compression {compression} to {stored} bytes, flags {flags:#x}, {size} bytes"
            raise CorruptFile(what, label, expected, found)
        records[name] = Record(first_byte + offset, size, first_byte + limit, path, checksum)
    return Container(file, label, size_bytes, records)


def _read_directory(file: BinaryIO, first_byte: int, size_bytes: int) -> tuple[int, bytes]:
    """The directory before a container's end, and where it begins in the container.

    Raises:
        ValueError, struct.error: there is none, or it is larger than that of any checkpoint.
    """
    tail_bytes = min(size_bytes, _TAIL_BYTES)
    file.seek(first_byte + size_bytes - tail_bytes)
    tail, end_bytes = file.read(tail_bytes), size_bytes - _END.size
    signature, directory_bytes, offset_bytes, comment_bytes = _END.unpack(tail[-_END.size :])
    is_end = signature == b"PK\5\6" and not comment_bytes
    if tail[-_END.size - _LOCATOR_BYTES :].startswith(b"PK\6\7"):
        end_bytes -= _LOCATOR_BYTES + _LONG_END.size
        signature, directory_bytes, offset_bytes = _LONG_END.unpack_from(tail, end_bytes - size_bytes)
        is_end = is_end and signature == b"PK\6\6"
    if not is_end or offset_bytes + directory_bytes != end_bytes:
        raise ValueError("no directory of records at its end")
    if directory_bytes > _MAX_DIRECTORY_BYTES:
        most = human_bytes(_MAX_DIRECTORY_BYTES)
        raise ValueError(f"a directory of {human_bytes(directory_bytes)}, more than {most}")
    if directory_bytes <= end_bytes - size_bytes + tail_bytes:
        return offset_bytes, tail[offset_bytes - size_bytes :][:directory_bytes]
    file.seek(first_byte + offset_bytes)
    return offset_bytes, file.read(directory_bytes)


#: Of a record: offset of its local header, size, stored size, compression, flags, name, CRC-32.
_Entry = tuple[int, int, int, int, int, bytes, int]


def _entries(directory: bytes) -> Iterator[_Entry]:
    """What a directory lists; a ValueError or struct.error where it is damaged."""
    at = 0
    while at < len(directory):
        signature, flags, compression, checksum, *sizes, path_bytes, extra_bytes, comment_bytes, offset = (
            _HEADER.unpack_from(directory, at)
        )
        path_at = at + _HEADER.size
        extra_at = path_at + path_bytes
        at = extra_at + extra_bytes + comment_bytes
        if signature != b"PK\1\2" or at > len(directory):
            raise ValueError("a damaged directory")
        stored, size = sizes
        if _ELSEWHERE in (size, stored, offset):
            extra = directory[extra_at : extra_at + extra_bytes]
            size, stored, offset = _long_numbers(extra, (size, stored, offset))
        yield offset, size, stored, compression, flags, directory[path_at:extra_at], checksum


def _long_numbers(extra: bytes, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers, those that are elsewhere by an extra field (APPNOTE.TXT, 4.5.3); raises as `_entries` does."""
    at = 0
    while at < len(extra):
        kind, size_bytes = struct.unpack_from("<2H", extra, at)
        if kind == 1 and size_bytes >= 8 * numbers.count(_ELSEWHERE):
            long = iter(struct.unpack_from(f"<{numbers.count(_ELSEWHERE)}Q", extra, at + 4))
            return tuple(next(long) if number == _ELSEWHERE else number for number in numbers)
        at += 4 + size_bytes
    raise ValueError("a 64-bit number is missing")


def read_small_record(container: Container, name: str) -> bytes:
    """The bytes of a small record such as `data.pkl`; a CorruptFile where it is absent, too large or damaged."""
    record = container.records.get(name)
    if record is None or record.size_bytes > MAX_PICKLE_BYTES:
        raise CorruptFile(
            f"no usable record {name!r}",
            container.label,
            expected=f"a record of at most {human_bytes(MAX_PICKLE_BYTES)}",
            found="none" if record is None else human_bytes(record.size_bytes),
            remedy="check that this is a model_optim_rng.pt of Megatron's `torch` format",
        )
    container.file.seek(data_offset_bytes(container, name))
    content = container.file.read(record.size_bytes)
    if record.checksum and zlib.crc32(content) != record.checksum:  # 0: torch was told not to work it out
        raise CorruptFile("a record cannot be read", container.label, found=f"Bad CRC-32 for file {name!r}")
    return content


def data_offset_bytes(container: Container, name: str) -> int:
    """Where the data of a record begins in the file: its local header tells, which torch pads to align the data.

    Raises:
        CorruptFile: the record is absent, or its local header is damaged or runs out of the file.
    """
    record, file = container.records.get(name), container.file
    if record is None:
        raise CorruptFile(f"storage {name!r} is absent", container.label)
    file.seek(record.header_offset_bytes)
    header = file.read(_LOCAL_HEADER.size)
    whole = len(header) == _LOCAL_HEADER.size and header[:4] == b"PK\x03\x04"
    _, checksum, path_bytes, extra_bytes = _LOCAL_HEADER.unpack(header) if whole else (b"", 0, 0, 0)
    is_same = checksum == record.checksum or 0 in (checksum, record.checksum)  # 0: not here, or nobody worked it out
    if file.read(path_bytes) != record.path or not _is_well_formed(file.read(extra_bytes)) or not is_same:
        raise CorruptFile(f"damaged local header of {name!r}", container.label)
    offset_bytes = file.tell()
    if offset_bytes + record.size_bytes > record.limit_bytes:
        what, expected = f"storage {name!r} runs into the next record", f"data up to byte {record.limit_bytes} at most"
        raise CorruptFile(what, container.label, expected, found=f"{offset_bytes}..{offset_bytes + record.size_bytes}")
    return offset_bytes


def _is_well_formed(extra: bytes) -> bool:
    """Whether extra fields, each an id, a length and data, fill their space exactly."""
    at = 0
    while at < len(extra):
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    return at == len(extra)


def open_object(
    file: BinaryIO,
    label: str,
    first_byte: int = 0,
    size_bytes: int | None = None,
    *,
    known: dict[bytes, Any] | None = None,
) -> tuple[Container, Any]:
    """The container that an open file is, and what was saved in it, with inert records in place of objects.

    Args:
        file, label, first_byte, size_bytes: see `open_container`.
        known: what equal pickles hold, by their SHA-256: blobs of one shape have the same. Filled here.

    Raises:
        CorruptFile, UnsafePickle: see `open_container` and `restricted_pickle`.
        UnsupportedModel: saved on a big-endian machine.
    """
    container = open_container(file, label, first_byte, size_bytes)
    data = read_small_record(container, "data.pkl")
    if "byteorder" in container.records and read_small_record(container, "byteorder") != b"little":
        raise UnsupportedModel("saved on a big-endian machine", label, expected="little endian")
    if known is None:
        return container, load(data, label)
    if (digest := hashlib.sha256(data).digest()) not in known:
        known[digest] = load(data, label)
    return container, known[digest]


def open_dict(file: BinaryIO, label: str) -> tuple[Container, Mapping[str, Any]]:
    """The same where a dict was saved; a CorruptFile where it is something else."""
    container, saved = open_object(file, label)
    if not isinstance(saved, Mapping):
        raise CorruptFile("not a checkpoint file", label, expected="a dict", found=class_of(saved))
    return container, saved


def place_tensors(tensors: Mapping[str, Tensor], container: Container) -> dict[str, StoredTensor]:
    """Where each tensor's first element is in the file, and how the others follow.

    Raises:
        CorruptFile: a tensor reaches past its storage, or a storage is damaged.
    """
    records = sorted({f"data/{tensor.storage.key}" for tensor in tensors.values()})
    offsets_bytes = {name: data_offset_bytes(container, name) for name in records}
    stored = {}
    for name, tensor in tensors.items():
        key, dtype = f"data/{tensor.storage.key}", tensor.storage.dtype
        record, item_bytes = container.records[key], DTYPE_BYTES[dtype]
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
        end_bytes = (tensor.offset + reach + 1) * item_bytes if all(tensor.shape) else 0
        if end_bytes > record.size_bytes:
            what, expected = "a tensor reaches past its storage", f"at least {end_bytes} bytes in {key}"
            raise CorruptFile(what, container.label, expected, found=f"{record.size_bytes} bytes", tensor=name)
        is_all = (reach + 1) * item_bytes == math.prod(tensor.shape) * item_bytes == record.size_bytes
        checksum = (record.checksum or None) if is_all else None
        offset_bytes = offsets_bytes[key] + tensor.offset * item_bytes
        stored[name] = StoredTensor(name, container.label, dtype, tensor.shape, tensor.strides, offset_bytes, checksum)
    return stored


def read_pickled_weights(path: Path, file: str) -> dict[str, StoredTensor]:
    """Every tensor of the file, by name, with the strides that it was saved with.

    Raises:
        CorruptFile, UnsafePickle: see `open_container` and `restricted_pickle`; or a tensor outside its storage.
        UnsupportedModel: no flat dict of tensors, or of a big-endian machine.
    """
    with opened_source(path, file) as opened:
        container, saved = open_dict(opened, file)
        others = [
            f"{key}: {class_of(value)}"
            for key, value in saved.items()
            if not (isinstance(key, str) and isinstance(value, Tensor))
        ]
        if others:
            what = "a weights file that holds more than named tensors"
            expected = "the flat dict of tensors that save_pretrained writes"
            remedy = "load the model with transformers and save it with save_pretrained"
            raise UnsupportedModel(what, file, expected, found=names(others), remedy=remedy)
        return place_tensors(saved, container)
