"""The zip container that `torch.save` writes: which records it holds and where their bytes are.

Only the central directory and single local headers are read, never a record's data (except the pickle, on
request). Format: https://docs.pytorch.org/docs/stable/notes/serialization.html and PKWARE's APPNOTE.TXT.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dist_convert.errors import CorruptFile, SourceError

#: A pickle of args, optimizer groups and a few hundred thousand tensor records stays far below this.
MAX_PICKLE_BYTES = 256 << 20
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True)
class Record:
    """One stored record: its name without the archive's folder, and where its local header and data begin."""

    name: str
    header_offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class Container:
    """The records of one `.pt` file, by name."""

    path: Path
    label: str
    size_bytes: int
    records: dict[str, Record]


def open_container(path: Path, label: str) -> Container:
    """List the records of a `.pt` file after checking that they are stored, in bounds and do not overlap.

    Args:
        path: the file on this machine.
        label: how messages name it.

    Raises:
        CorruptFile: not a zip, cut short, or with entries that torch never writes.
    """
    try:
        size_bytes = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    except OSError as error:
        raise SourceError("cannot read the source", file=label, found=error.strerror or str(error)) from error
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as error:
        raise CorruptFile(
            "not a complete torch checkpoint file",
            file=label,
            expected="the zip container of torch.save (torch 1.6 or newer)",
            found=f"{error}, in {size_bytes} bytes",
            remedy="copy the file again; if it was saved in the old format, load and save it with a current torch",
        ) from error
    records: dict[str, Record] = {}
    for entry, following in zip(entries, [*entries[1:], None], strict=True):
        end = entry.header_offset + _LOCAL_HEADER.size + entry.file_size
        limit = following.header_offset if following else size_bytes
        name = entry.filename.partition("/")[2]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or end > limit or name in records:
            raise CorruptFile(
                f"zip entry {entry.filename!r} is not one that torch writes",
                file=label,
                expected=f"stored, unencrypted, named once, inside bytes {entry.header_offset}..{limit}",
                found=f"compression {entry.compress_type}, flags {entry.flag_bits:#x}, {entry.file_size} bytes",
                remedy="copy the file again from the machine that saved it",
            )
        records[name] = Record(name, entry.header_offset, entry.file_size)
    return Container(path, label, size_bytes, records)


@contextmanager
def _opened(container: Container) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(container.path) as archive:
            yield archive
    except (zipfile.BadZipFile, EOFError) as error:
        raise CorruptFile("a record cannot be read", file=container.label, found=str(error)) from error


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
            expected=f"a record of at most {MAX_PICKLE_BYTES} bytes",
            found="none" if record is None else f"{record.size_bytes} bytes",
            remedy="check that this is a model_optim_rng.pt of Megatron's `torch` format",
        )
    with _opened(container) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.partition("/")[2] == name)
        return archive.read(entry)


def data_offsets_bytes(container: Container, names: list[str]) -> dict[str, int]:
    """Where the data of the named records begins in the file.

    The local headers are read because torch pads each one to align its data.

    Raises:
        CorruptFile: a record is absent, or its local header is damaged or runs out of the file.
    """
    offsets: dict[str, int] = {}
    with container.path.open("rb") as file:
        for name in names:
            record = container.records.get(name)
            if record is None:
                raise CorruptFile(f"storage {name!r} is absent", file=container.label, remedy="copy the file again")
            file.seek(record.header_offset_bytes)
            header = file.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
                raise CorruptFile(f"damaged local header of {name!r}", file=container.label)
            fields = _LOCAL_HEADER.unpack(header)
            name_bytes, extra_bytes = fields[9], fields[10]
            offsets[name] = record.header_offset_bytes + _LOCAL_HEADER.size + name_bytes + extra_bytes
            if offsets[name] + record.size_bytes > container.size_bytes:
                raise CorruptFile(
                    f"storage {name!r} runs past the end of the file",
                    file=container.label,
                    expected=f"at least {offsets[name] + record.size_bytes} bytes",
                    found=f"{container.size_bytes} bytes",
                    remedy="copy the file again; this one is cut short",
                )
    return offsets
