"""The container of `torch.save`: where its records' bytes are, and that no damaged or foreign zip passes for one."""

from __future__ import annotations

import io
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_convert.errors import CorruptFile, SourceError, UnsupportedModel
from dist_convert.formats.saved import lay_out_container
from dist_convert.formats.torch.shards import read_shard
from dist_convert.read import torch_file
from dist_convert.read.source import opened_source
from dist_convert.read.torch_file import (
    Container,
    data_offset_bytes,
    open_container,
    open_object,
    place_tensors,
    read_small_record,
)

LABEL = "mp_rank_00/model_optim_rng.pt"
#: Where fields lie in a central directory header, and in a local one (APPNOTE.TXT, 4.3.12 and 4.3.7).
FLAGS, STORED_SIZE, SIZE, HEADER_OFFSET, NAME = 8, 20, 24, 42, 46
LOCAL_CHECKSUM, LOCAL_NAME_LENGTH, LOCAL_EXTRA_LENGTH = 14, 26, 28


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file of `torch.save` with storages of 400 and 12 bytes."""
    path = tmp_path / "model_optim_rng.pt"
    torch.save({"a": torch.arange(100, dtype=torch.float32), "b": torch.tensor([7, 8, 9], dtype=torch.int32)}, path)
    return path


def container_of(path: Path) -> Container:
    return open_container(io.BytesIO(path.read_bytes()), LABEL)


def place_storages(path: Path) -> list[int]:
    container = container_of(path)
    return [data_offset_bytes(container, record) for record in ("data/0", "data/1")]


def entry(path: Path, record: str) -> zipfile.ZipInfo:
    with zipfile.ZipFile(path) as archive:
        return next(entry for entry in archive.infolist() if entry.filename.endswith("/" + record))


def patch(path: Path, at: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)


def patch_directory(path: Path, record: str, field: int, value: bytes) -> None:
    """Change a field of a record's header in the central directory."""
    data = path.read_bytes()
    directory = zipfile.ZipFile(io.BytesIO(data)).start_dir
    header = data.index(entry(path, record).filename.encode(), directory) - NAME
    patch(path, header + field, value)


def reads_by_this_process() -> int:
    return int(Path("/proc/self/io").read_text().split()[5])  # syscr


def write_zip(path: Path, *names: str, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in names:
            archive.writestr(name, b"some bytes" * 10)


@pytest.mark.parametrize("record", ["data/0", "data/1"])
def test_the_bytes_of_a_storage_are_at_the_offset_given(saved: Path, record: str) -> None:
    container = container_of(saved)
    offset = data_offset_bytes(container, record)
    found = saved.read_bytes()[offset : offset + container.records[record].size_bytes]
    with zipfile.ZipFile(saved) as archive:
        assert found == archive.read(entry(saved, record))
    assert offset % 64 == 0  # so the padding in front of the data was not taken for data


def test_a_container_within_a_file_is_read_there(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    (tmp_path / "blobs").write_bytes(b"PK" * 50 + data + b"PK\5\6" + bytes(18))
    with (tmp_path / "blobs").open("rb") as file:
        container = open_container(file, LABEL, 100, len(data))
        assert read_small_record(container, "byteorder") == b"little"
        assert data_offset_bytes(container, "data/1") == 100 + place_storages(saved)[1]


def write_large(path: Path) -> None:
    """Records of 5 GiB, which is a hole, and behind it of 3 bytes."""
    made = lay_out_container(b"N.", (5 << 30, 3))
    with path.open("wb") as file:
        for start, piece in made.pieces:
            file.seek(start)
            file.write(piece)


def test_sizes_and_offsets_beyond_four_gibibytes_are_read_in_full(tmp_path: Path) -> None:
    write_large(tmp_path / "large.pt")
    with (tmp_path / "large.pt").open("rb") as file:
        container = open_container(file, LABEL)
        assert [container.records[f"data/{key}"].size_bytes for key in (0, 1)] == [5 << 30, 3]
        first, second = (data_offset_bytes(container, f"data/{key}") for key in (0, 1))
    assert (5 << 30) < second - first < (5 << 30) + 256


def test_a_size_beyond_four_gibibytes_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    write_large(tmp_path / "large.pt")
    with (tmp_path / "large.pt").open("r+b") as file:
        file.seek(-1200, os.SEEK_END)
        tail = file.read()
        field = struct.pack("<2HQ", 1, 16, 5 << 30)
        assert tail.count(field) == 1
        file.seek(-1200 + tail.index(field), os.SEEK_END)
        file.write(b"\2")  # of another kind
        with pytest.raises(CorruptFile) as caught:
            open_container(file, LABEL)
    assert "a 64-bit number is missing" in caught.value.found


def test_a_header_takes_two_reads_however_large_the_tensor(tmp_path: Path) -> None:
    torch.save(torch.zeros(1000, 1000), tmp_path / "tensor.pt")
    with opened_source(tmp_path / "tensor.pt", LABEL) as file:
        counted = [reads_by_this_process(), reads_by_this_process()]  # each counts its own as well
        container, tensor = open_object(file, LABEL)
        place_tensors({"a": tensor}, container)
        counted.append(reads_by_this_process())
    assert counted[2] - counted[1] - (counted[1] - counted[0]) == 2


def test_records_are_named_without_the_archive_folder(saved: Path) -> None:
    assert {"data.pkl", "data/0", "data/1", "byteorder"} <= set(container_of(saved).records)


def test_a_small_record_is_read_whole(saved: Path) -> None:
    assert read_small_record(container_of(saved), "byteorder") == b"little"


@pytest.mark.parametrize("kept", [0, 1, 29, 30, 63, 64, 400, 600, 1000, -300, -64, -23, -22, -21, -1])
def test_a_truncated_file_is_named_with_what_to_do(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(CorruptFile) as caught:
        container_of(saved)
    assert caught.value.file == LABEL
    assert "copy the file again" in caught.value.remedy


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 4096, b"PK\x03\x04" * 100, b"PK\x05\x06" + b"\xff" * 18])
def test_what_is_no_zip_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match="not a complete torch checkpoint"):
        container_of(path)


def test_a_zip_without_entries_is_refused(tmp_path: Path) -> None:
    write_zip(tmp_path / "file.pt")
    with pytest.raises(CorruptFile, match=r"no usable record 'data\.pkl'") as caught:
        read_shard(tmp_path / "file.pt", LABEL)
    assert caught.value.file == LABEL


def test_the_format_before_torch_1_6_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CorruptFile) as caught:
        container_of(path)
    assert "old format" in caught.value.remedy


def test_compressed_entries_are_refused_by_name(tmp_path: Path) -> None:
    write_zip(tmp_path / "file.pt", "archive/data.pkl", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CorruptFile, match=r"'archive/data\.pkl' is not one that torch writes") as caught:
        container_of(tmp_path / "file.pt")
    assert caught.value.file == LABEL


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["archive/data.pkl", "other/data.pkl"])
def test_two_records_of_one_name_are_refused(tmp_path: Path, second: str) -> None:
    write_zip(tmp_path / "file.pt", "archive/data.pkl", second)
    with pytest.raises(CorruptFile, match="is not one that torch writes"):
        container_of(tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(FLAGS, b"\x01\x00", id="encrypted"),
        pytest.param(STORED_SIZE, struct.pack("<I", 0x7FFFFFFF), id="stored in more bytes than it has"),
        pytest.param(SIZE, struct.pack("<I", 2000), id="larger than the room up to the next entry"),
        pytest.param(SIZE, struct.pack("<I", 0xFFFFFFF0), id="larger than the file"),
        pytest.param(HEADER_OFFSET, struct.pack("<I", 1200), id="inside another entry"),
        pytest.param(HEADER_OFFSET, struct.pack("<I", 0xFFFFFFF0), id="past the end of the file"),
    ],
)
def test_a_directory_entry_that_torch_never_writes_is_refused(saved: Path, field: int, value: bytes) -> None:
    patch_directory(saved, "data/0", field, value)
    with pytest.raises(CorruptFile) as caught:
        place_storages(saved)
    assert caught.value.file == LABEL


@pytest.mark.parametrize("record", ["data/0", "data/1"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(0, b"XX", id="signature"),
        pytest.param(LOCAL_EXTRA_LENGTH, b"\xff\xff", id="padding that ends past the file"),
        pytest.param(LOCAL_EXTRA_LENGTH, b"\x80\x00", id="padding that ends in the next record"),
        pytest.param(LOCAL_EXTRA_LENGTH, b"\x01\x00", id="padding that is too short"),
        pytest.param(LOCAL_NAME_LENGTH, b"\x01\x00", id="name that is too short"),
        pytest.param(LOCAL_CHECKSUM, b"\x01\x00\x00\x00", id="checksum that the directory contradicts"),
    ],
)
def test_a_damaged_local_header_cannot_shift_a_storage(saved: Path, record: str, field: int, value: bytes) -> None:
    patch(saved, entry(saved, record).header_offset + field, value)
    with pytest.raises(CorruptFile) as caught:
        data_offset_bytes(container_of(saved), record)
    assert caught.value.file == LABEL


def test_a_storage_without_a_record_is_named(saved: Path) -> None:
    with pytest.raises(CorruptFile, match="'data/2' is absent") as caught:
        data_offset_bytes(container_of(saved), "data/2")
    assert caught.value.file == LABEL


def test_a_zip_without_a_pickle_is_refused_with_what_is_expected(tmp_path: Path) -> None:
    write_zip(tmp_path / "file.pt", "archive/other")
    with pytest.raises(CorruptFile, match=r"no usable record 'data\.pkl'") as caught:
        read_small_record(container_of(tmp_path / "file.pt"), "data.pkl")
    assert "model_optim_rng.pt" in caught.value.remedy


def test_an_oversized_pickle_is_refused_before_it_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", 100)
    with pytest.raises(CorruptFile) as caught:
        read_small_record(container_of(saved), "data.pkl")
    assert caught.value.expected == "a record of at most 100 B"


def test_a_flipped_bit_in_the_pickle_fails_its_checksum(saved: Path) -> None:
    data = saved.read_bytes()
    patch(saved, data.index(b"FloatStorage"), b"f")
    with pytest.raises(CorruptFile, match="cannot be read") as caught:
        read_small_record(container_of(saved), "data.pkl")
    assert caught.value.file == LABEL


@pytest.mark.parametrize("flags", [0x0020, 0x0040], ids=["patch data", "strong encryption"])
def test_a_pickle_stored_in_a_way_that_torch_never_does_is_refused(saved: Path, flags: int) -> None:
    patch_directory(saved, "data.pkl", FLAGS, struct.pack("<H", flags))
    with pytest.raises(CorruptFile) as caught:
        read_small_record(container_of(saved), "data.pkl")
    assert caught.value.file == LABEL


def test_big_endian_files_are_refused_by_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"N.")
        archive.writestr("archive/byteorder", b"big")
    with pytest.raises(UnsupportedModel, match="big-endian"):
        read_shard(tmp_path / "file.pt", LABEL)


def test_a_directory_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        read_shard(tmp_path, LABEL)
    assert caught.value.file == LABEL


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        read_shard(tmp_path / "gone.pt", LABEL)
    assert caught.value.file == LABEL


@pytest.fixture
def unreadable(saved: Path) -> Iterator[Path]:
    """A file that this user may not read; root, who may read all, becomes somebody else meanwhile."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        path = Path(shutil.copy(saved, directory))
        path.chmod(0)
        was = os.geteuid()
        if was == 0:
            os.seteuid(65534)
        try:
            yield path
        finally:
            os.seteuid(was)


def test_a_file_that_may_not_be_read_is_named(unreadable: Path) -> None:
    with pytest.raises(SourceError) as caught:
        read_shard(unreadable, LABEL)
    assert caught.value.file == LABEL
    assert "denied" in str(caught.value)
