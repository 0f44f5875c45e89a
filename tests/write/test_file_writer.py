"""Positioned writes: which bytes of a file change, how many files stay open, and what a refusal looks like."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from dist_convert.errors import NotEnoughSpace, PlanError, TargetError
from dist_convert.records import View
from dist_convert.write.files import FileWriter, held


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[FileWriter]:
    (tmp_path / "a").write_bytes(b"." * 16)
    with held(tmp_path) as directory, closing(FileWriter(directory)) as writer:
        yield writer


def view(
    offset: int, rows: int, columns: int, *, row_stride: int | None = None, dtype: str = "U8", file: str = "a"
) -> View:
    return View(file, "w", dtype, offset, rows, columns, columns if row_stride is None else row_stride, 1)


def open_files(directory: Path) -> int:
    links = (os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(link).startswith(str(directory) + "/") for link in links)


@pytest.mark.parametrize(
    ("where", "data", "expected"),
    [
        (view(0, 1, 4), b"abcd", b"abcd............"),
        (view(5, 2, 3), b"abcdef", b".....abcdef....."),
        (view(1, 3, 2, row_stride=5), b"abcdef", b".ab...cd...ef..."),
        (view(2, 3, 1, row_stride=4), b"abc", b"..a...b...c....."),
        (view(2, 2, 1, row_stride=3, dtype="F32"), b"abcdABCD", b"..abcd........ABCD"),
        (view(4, 2, 2, row_stride=3, dtype="BF16"), b"abcdABCD", b"....abcd..ABCD.."),
        (view(3, 0, 4), b"", b"................"),
    ],
)
def test_rows_in_memory_go_to_the_bytes_of_the_view_and_no_others(
    tmp_path: Path, writer: FileWriter, where: View, data: bytes, expected: bytes
) -> None:
    writer.write(where, memoryview(data))
    assert (tmp_path / "a").read_bytes() == expected
    assert writer.written_bytes == len(data)


@pytest.mark.parametrize("data", [b"abc", b"abcdefg"])
def test_fewer_or_more_bytes_than_the_view_has_are_not_written(tmp_path: Path, writer: FileWriter, data: bytes) -> None:
    with pytest.raises(PlanError, match="not as many bytes as the window has"):
        writer.write(view(0, 2, 2), memoryview(data))
    assert (tmp_path / "a").read_bytes() == b"." * 16


def test_a_disk_that_takes_nothing_and_gives_no_reason_is_an_error(
    tmp_path: Path, writer: FileWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(TargetError) as caught:
        writer.write(view(0, 1, 4), memoryview(b"abcd"))
    assert (caught.value.file, caught.value.found) == (str(tmp_path / "a"), "nothing of it was written")


def test_written_bytes_add_up_over_files(tmp_path: Path, writer: FileWriter) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/b").write_bytes(b"")
    writer.write(view(0, 1, 3), memoryview(b"abc"))
    writer.write(view(2, 1, 4, file="deep/b"), memoryview(b"defg"))
    assert (tmp_path / "deep/b").read_bytes() == b"\x00\x00defg"
    assert writer.written_bytes == 7


def test_at_most_64_files_are_open_and_each_gets_its_bytes(tmp_path: Path, writer: FileWriter) -> None:
    files = [f"f{number}" for number in range(70)]
    for file in files:
        (tmp_path / file).touch()
    for text in (b"x", b"y"):
        for number, file in enumerate(files):
            writer.write(view(text[0] - ord("x"), 1, 1, file=file), memoryview(bytes([number])))
            assert open_files(tmp_path) <= 64
    assert [(tmp_path / file).read_bytes() for file in files] == [bytes([number] * 2) for number in range(70)]


def test_closing_leaves_no_file_open(tmp_path: Path, writer: FileWriter) -> None:
    writer.write(view(0, 1, 1), memoryview(b"x"))
    assert open_files(tmp_path) == 1
    writer.close()
    assert open_files(tmp_path) == 0


def test_a_file_that_is_not_there_is_named_and_not_made(tmp_path: Path, writer: FileWriter) -> None:
    with pytest.raises(TargetError) as caught:
        writer.write(view(0, 1, 1, file="absent"), memoryview(b"x"))
    assert (caught.value.file, caught.value.found) == (str(tmp_path / "absent"), "No such file or directory")
    assert not (tmp_path / "absent").exists()


def test_a_full_file_system_is_told_from_other_refusals(make_disk: Callable[[str], Path]) -> None:
    disk = make_disk("size=16k")
    (disk / "full").touch()
    with held(disk) as directory, closing(FileWriter(directory)) as writer, pytest.raises(NotEnoughSpace) as caught:
        writer.write(view(0, 1, 20_000, file="full"), memoryview(bytes(20_000)))
    assert (caught.value.file, caught.value.found) == (str(disk / "full"), "No space left on device")
