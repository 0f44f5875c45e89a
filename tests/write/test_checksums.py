"""Checksums of files that were filled in place, as zip tools and torch itself compute them."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dist_convert.errors import CorruptFile
from dist_convert.formats.saved import lay_out_container
from dist_convert.read.torch_file import data_offset_bytes, open_container
from dist_convert.write.checksums import KnownRange, ZipRecord, checksum_of, write_record_checksums
from dist_convert.write.files import held, make_file, opened
from tests.write import write_shard

STATE = {
    "w": torch.arange(100.0), "empty": torch.empty(0), "b": torch.tensor([1, 2, 3], dtype=torch.int8),
    "n": torch.tensor(2.5),
}  # fmt: skip
DATA = {f"data/{key}": tensor.reshape(-1).numpy().tobytes() for key, tensor in enumerate(STATE.values())}
CHECKSUMS = {name: zlib.crc32(data) for name, data in DATA.items()}

Storages = tuple[ZipRecord, ...]


def record_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Where the storages lie: record name -> (offset, size)."""
    with path.open("rb") as file:
        container = open_container(file, path.name)
        storages = {name: record for name, record in container.records.items() if name.startswith("data/")}
        return {name: (data_offset_bytes(container, name), record.size_bytes) for name, record in storages.items()}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A file that torch saved."""
    path = tmp_path / "whole.pt"
    with path.open("wb") as file:
        torch.save(STATE, file)
    return path


@pytest.fixture
def storages(whole: Path) -> Storages:
    """`filled.pt` beside it with the same object, and the data written into it afterwards: its storages."""
    with zipfile.ZipFile(whole) as archive:
        container = lay_out_container(archive.read("archive/data.pkl"), [len(data) for data in DATA.values()])
    with held(whole.parent) as directory:
        make_file(directory, "filled.pt", container.pieces, container.size_bytes)
    with (whole.parent / "filled.pt").open("r+b") as file:
        for record, data in zip(container.storages, DATA.values(), strict=True):
            os.pwrite(file.fileno(), data, record.start_bytes)
    return container.storages


@pytest.fixture
def filled(storages: Storages, tmp_path: Path) -> Path:
    assert storages
    return tmp_path / "filled.pt"


def seal(path: Path, storages: Storages, known: Sequence[KnownRange] = ()) -> None:
    with held(path.parent) as directory:
        write_record_checksums(directory, path.name, path.stat().st_size, storages, known)


def without_serialization_id(path: Path) -> bytes:
    """All bytes but those of torch's digest of the records, and that digest's checksums."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("archive/.data/serialization_id")
        digest, checksum = archive.read(entry), entry.CRC.to_bytes(4, "little")
        start_dir = archive.start_dir
    at = data.index(digest, entry.header_offset)
    data[at : at + 40 + 4 + 4] = bytes(48)  # the digest; its descriptor's signature and checksum
    at = data.index(checksum, data.index(entry.filename.encode(), start_dir) - 46)
    data[at : at + 4] = bytes(4)
    return bytes(data)


def test_a_truncated_file_is_not_sealed(filled: Path, storages: Storages) -> None:
    size_bytes = filled.stat().st_size
    os.truncate(filled, size_bytes - 30)
    with pytest.raises(CorruptFile, match="has another size") as caught:
        write_record_checksums(filled.parent, filled.name, size_bytes, storages, [])
    assert caught.value.file == "filled.pt"


def test_a_patched_file_is_the_one_that_torch_writes_with_the_data(
    whole: Path, filled: Path, storages: Storages
) -> None:
    assert without_serialization_id(filled) != without_serialization_id(whole)
    seal(filled, storages)
    assert without_serialization_id(filled) == without_serialization_id(whole)


def test_zip_readers_find_a_patched_file_sound_and_an_unpatched_one_not(filled: Path, storages: Storages) -> None:
    with zipfile.ZipFile(filled) as archive:
        assert archive.testzip() == "archive/data/0"
    seal(filled, storages)
    with zipfile.ZipFile(filled) as archive:
        assert archive.testzip() is None


def test_a_file_filled_in_halves_is_sound_after_combining_their_checksums(tmp_path: Path) -> None:
    path = tmp_path / "model_optim_rng.pt"
    container = write_shard(
        path.parent,
        path.name,
        {"num_layers": 1},
        7,
        [[("w", "F32", (100,)), ("empty", "F32", (0,)), ("b", "I8", (3,))]],
    )
    known = []
    with path.open("r+b") as file:
        for name, (offset, size) in record_ranges(path).items():
            halves = DATA[name][: size // 2], DATA[name][size // 2 :]
            for half, at in zip(halves, (offset, offset + size // 2), strict=True):
                os.pwrite(file.fileno(), half, at)
                known.append((at, len(half), zlib.crc32(half)))
    seal(path, container.storages, sorted(known))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(f"archive/{name}") for name in ("data/0", "data/1", "data/2")} == {
            name: DATA[name] for name in ("data/0", "data/1", "data/2")
        }


@pytest.mark.skipif(shutil.which("unzip") is None, reason="unzip is not installed")
def test_unzip_finds_a_patched_file_sound_and_a_flipped_bit_not(filled: Path, storages: Storages) -> None:
    seal(filled, storages)
    assert subprocess.run(["unzip", "-tqq", str(filled)], capture_output=True).returncode == 0
    offset, _ = record_ranges(filled)["data/2"]
    with filled.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x00")
    result = subprocess.run(["unzip", "-tqq", str(filled)], capture_output=True, text=True)
    assert result.returncode != 0
    assert "archive/data/2" in result.stdout


def test_patching_twice_gives_the_same_bytes(filled: Path, storages: Storages) -> None:
    seal(filled, storages)
    once = filled.read_bytes()
    seal(filled, storages)
    assert filled.read_bytes() == once


def test_a_record_without_its_descriptor_is_refused(filled: Path, storages: Storages) -> None:
    offset, size = record_ranges(filled)["data/2"]
    with filled.open("r+b") as file:
        file.seek(offset + size)
        file.write(b"xx")
    with pytest.raises(CorruptFile) as caught:
        seal(filled, storages)
    assert caught.value.file == "filled.pt"


def test_records_beyond_four_gibibytes_are_patched_in_the_right_places(tmp_path: Path) -> None:
    path = tmp_path / "model_optim_rng.pt"
    container = write_shard(
        path.parent, path.name, {"num_layers": 1}, 7, [[("huge", "U8", (5 << 30,)), ("far", "I8", (3,))]]
    )
    offset, size = record_ranges(path)["data/1"]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(DATA["data/2"])
    huge, _ = record_ranges(path)["data/0"]
    seal(path, container.storages, [(huge, 5 << 30, 423114947)])  # of zeros
    with zipfile.ZipFile(path) as archive:
        assert [archive.getinfo(f"archive/data/{key}").CRC for key in (0, 1)] == [423114947, CHECKSUMS["data/2"]]
        assert archive.read("archive/data/1") == DATA["data/2"]  # which checks its checksum
        assert archive.read("archive/version") == b"3\n"
    data = path.open("rb")
    data.seek(offset + size)
    assert data.read(8) == b"PK\x07\x08" + CHECKSUMS["data/2"].to_bytes(4, "little")
    data.close()


@pytest.mark.parametrize(
    "known",
    [[], [(0, 100)], [(10, 20), (50, 50)], [(10, 20), (30, 5), (90, 10)], [(10, 40), (30, 30), (95, 20)]],
    ids=["nothing", "all", "gaps", "neighbours", "an overlap and one that reaches beyond"],
)
@pytest.mark.parametrize(("start", "end"), [(0, 100), (10, 100), (5, 60)])
def test_what_no_known_range_covers_is_read(known: list[tuple[int, int]], start: int, end: int, tmp_path: Path) -> None:
    data = random.Random(7).randbytes(120)
    (tmp_path / "file").write_bytes(data)
    ranges = [(offset, size, zlib.crc32(data[offset : offset + size])) for offset, size in known]
    with opened(tmp_path, "file") as descriptor:
        assert checksum_of(descriptor, "file", start, end, ranges) == zlib.crc32(data[start:end])


def test_a_file_that_has_become_shorter_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(50))
    with opened(tmp_path, "file") as descriptor, pytest.raises(CorruptFile, match="has become shorter") as caught:
        checksum_of(descriptor, "out/file", 0, 100, [])
    assert (caught.value.file, caught.value.found) == ("out/file", "50 bytes")
