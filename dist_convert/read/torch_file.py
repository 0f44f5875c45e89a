"""What `torch.save` wrote into a file: its zip container, the saved object, and where its tensors lie.

Only the central directory and single local headers are read, never a record's data (except the pickle, on request).
Format: https://docs.pytorch.org/docs/stable/notes/serialization.html and PKWARE's APPNOTE.TXT; storages:
docs/formats.md, "Storages".
"""

import hashlib
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
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
_UTF8_NAME = 0x800
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True)
class Record:
    """One stored record.

    Attributes:
        header_offset_bytes: of its local header.
        size_bytes: of its data.
        limit_bytes: where the next local header or the directory begins; its data ends before.
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
    """The records of an open `.pt` file, by name without the archive's folder.

    Attributes:
        file: of these bytes, a stretch of a larger file maybe.
        label: how messages name it.
        first_byte: where the container begins in the file that the label names.
        size_bytes: of the container.
        records: by name.
    """

    file: BinaryIO
    label: str
    first_byte: int
    size_bytes: int
    records: dict[str, Record]


class Stretch(io.RawIOBase):
    """Some bytes of an open file as a file of their own."""

    def __init__(self, descriptor: int, first_byte: int, size_bytes: int) -> None:
        self._descriptor, self._first_byte, self._size_bytes = descriptor, first_byte, size_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size_bytes}[whence]
        if start + offset < 0:
            raise ValueError("a place before the first byte")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        size_bytes = min(len(buffer), max(0, self._size_bytes - self._at))
        count = os.preadv(self._descriptor, [memoryview(buffer)[:size_bytes]], self._first_byte + self._at)
        self._at += count
        return count


def open_container(file: BinaryIO, label: str, first_byte: int = 0) -> Container:
    """List the records of a `.pt` file after checking that they are stored, in bounds and do not overlap.

    Args:
        file, label, first_byte: see `Container`.

    Raises:
        CorruptFile: not a zip, cut short, or with entries that torch never writes.
    """
    size_bytes = file.seek(0, os.SEEK_END)
    try:
        _check_directory(file)
        with zipfile.ZipFile(file) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            directory_bytes = archive.start_dir
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as error:
        if isinstance(error.__context__, OSError):  # as zipfile answers where the end cannot be read
            raise error.__context__ from error
        raise CorruptFile(
            "not a complete torch checkpoint file",
            file=label,
            expected="the zip container of torch.save (torch 1.6 or newer)",
            found=f"{error}, in {size_bytes} bytes",
            remedy="copy the file again; if it was saved in the old format, load and save it with a current torch",
        ) from error
    records: dict[str, Record] = {}
    for entry, following in zip(entries, [*entries, None][1:], strict=True):
        end = entry.header_offset + _LOCAL_HEADER.size + entry.file_size
        limit = following.header_offset if following else directory_bytes
        name = entry.filename.partition("/")[2]
        if (
            entry.compress_type != zipfile.ZIP_STORED
            or entry.compress_size != entry.file_size  # zipfile asks for so many bytes at once
            or entry.flag_bits & _FOREIGN_FLAGS
            or end > limit
            or entry.header_offset < 0
            or name in records
        ):
            raise CorruptFile(
                f"zip entry {entry.filename!r} is not one that torch writes",
                file=label,
                expected=f"stored, unencrypted, named once, inside bytes {entry.header_offset}..{limit}",
                found=f"compression {entry.compress_type} to {entry.compress_size} bytes, flags {entry.flag_bits:#x}, "
                f"{entry.file_size} bytes",
            )
        stored_name = entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF8_NAME else "cp437")
        records[name] = Record(entry.header_offset, entry.file_size, limit, stored_name, entry.CRC)
    return Container(file, label, first_byte, size_bytes, records)


def _check_directory(file: BinaryIO) -> None:
    """Refuse a directory that zipfile would read into memory, whatever its size.

    Raises:
        ValueError: it is larger than that of any checkpoint.
    """
    # Private by name only; typeshed does not know it. Its sixth number is the size of the directory.
    end: list[Any] | None = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end is not None and end[5] > _MAX_DIRECTORY_BYTES:
        raise ValueError(f"a directory of {human_bytes(end[5])}, not of {human_bytes(_MAX_DIRECTORY_BYTES)} at most")


def read_small_record(container: Container, name: str) -> bytes:
    """The bytes of a small record such as `data.pkl`.

    Raises:
        CorruptFile: absent, too large, or with a wrong checksum.
    """
    record = container.records.get(name)
    if record is None or record.size_bytes > MAX_PICKLE_BYTES:
        raise CorruptFile(
            f"no usable record {name!r}",
            file=container.label,
            expected=f"a record of at most {human_bytes(MAX_PICKLE_BYTES)}",
            found="none" if record is None else human_bytes(record.size_bytes),
            remedy="check that this is a model_optim_rng.pt of Megatron's `torch` format",
        )
    container.file.seek(data_offset_bytes(container, name))
    content = container.file.read(record.size_bytes)
    if record.checksum and zlib.crc32(content) != record.checksum:  # 0: torch was told not to work it out
        raise CorruptFile("a record cannot be read", file=container.label, found=f"Bad CRC-32 for file {name!r}")
    return content


def data_offset_bytes(container: Container, name: str) -> int:
    """Where the data of a record begins in the container: its local header tells, which torch pads to align the data.

    Raises:
        CorruptFile: the record is absent, or its local header is damaged or runs out of the file.
    """
    record, file = container.records.get(name), container.file
    if record is None:
        raise CorruptFile(f"storage {name!r} is absent", file=container.label)
    file.seek(record.header_offset_bytes)
    header = file.read(_LOCAL_HEADER.size)
    whole = len(header) == _LOCAL_HEADER.size and header[:4] == b"PK\x03\x04"
    path_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)[9:] if whole else (0, 0)
    if file.read(path_bytes) != record.path or not _is_well_formed(file.read(extra_bytes)):
        raise CorruptFile(f"damaged local header of {name!r}", file=container.label)
    offset_bytes = file.tell()
    if offset_bytes + record.size_bytes > record.limit_bytes:
        raise CorruptFile(
            f"storage {name!r} runs into the next record",
            file=container.label,
            expected=f"data up to byte {record.limit_bytes} at most",
            found=f"{offset_bytes}..{offset_bytes + record.size_bytes}",
        )
    return offset_bytes


def _is_well_formed(extra: bytes) -> bool:
    """Whether extra fields, each an id, a length and data, fill their space exactly."""
    at = 0
    while at < len(extra):
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    return at == len(extra)


def open_object(
    file: BinaryIO, label: str, first_byte: int = 0, *, known: dict[bytes, Any] | None = None
) -> tuple[Container, Any]:
    """The container that an open file is, and what was saved in it, with inert records in place of objects.

    Args:
        file, label, first_byte: see `Container`.
        known: what equal pickles hold, by their SHA-256: blobs of one shape have the same. Filled here.

    Raises:
        CorruptFile, UnsafePickle: see `open_container` and `restricted_pickle`.
        UnsupportedModel: saved on a big-endian machine.
    """
    container = open_container(file, label, first_byte)
    if "byteorder" in container.records and read_small_record(container, "byteorder") != b"little":
        raise UnsupportedModel("saved on a big-endian machine", file=label, expected="little endian")
    data = read_small_record(container, "data.pkl")
    if known is None:
        return container, load(data, label)
    if (digest := hashlib.sha256(data).digest()) not in known:
        known[digest] = load(data, label)
    return container, known[digest]


def open_dict(file: BinaryIO, label: str) -> tuple[Container, Mapping[str, Any]]:
    """The same where a dict was saved.

    Raises:
        CorruptFile: it is something else; see `open_object`, too.
    """
    container, saved = open_object(file, label)
    if not isinstance(saved, Mapping):
        raise CorruptFile("not a checkpoint file", file=label, expected="a dict", found=class_of(saved))
    return container, saved


def place_tensors(tensors: Mapping[str, Tensor], container: Container) -> dict[str, StoredTensor]:
    """Where each tensor's first element is in the file, and how the others follow.

    Raises:
        CorruptFile: a tensor reaches past its storage, or a storage is damaged.
    """
    records = sorted({f"data/{tensor.storage.key}" for tensor in tensors.values()})
    offsets_bytes = {name: container.first_byte + data_offset_bytes(container, name) for name in records}
    stored = {}
    for name, tensor in tensors.items():
        key, dtype = f"data/{tensor.storage.key}", tensor.storage.dtype
        record, item_bytes = container.records[key], DTYPE_BYTES[dtype]
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
        end_bytes = (tensor.offset + reach + 1) * item_bytes if all(tensor.shape) else 0
        if end_bytes > record.size_bytes:
            raise CorruptFile(
                "a tensor reaches past its storage",
                tensor=name,
                file=container.label,
                expected=f"at least {end_bytes} bytes in {key}",
                found=f"{record.size_bytes} bytes",
            )
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
            raise UnsupportedModel(
                "a weights file that holds more than tensors by name",
                file=file,
                expected="the flat dict of tensors that save_pretrained writes",
                found=names(others),
                remedy="load the model with transformers and save it with save_pretrained",
            )
        return place_tensors(saved, container)
