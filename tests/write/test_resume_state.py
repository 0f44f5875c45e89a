"""Which lines of earlier runs' journals count: those whose bytes the disk, or a kernel that still runs, must have."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dist_convert.records import Window
from dist_convert.write.files import Directory
from dist_convert.write.journal import Journal, ResumeState, joined, journals, last_run, read_journal, resume_state_of

FILE, NAME = "model.safetensors", "run-00001-rank-00000"
HERE = ("node7", "e1b0")
#: Its run began on `HERE`.
HEAD = {"run": 1, "rank": 0, "host": "node7", "boot": "e1b0"}


def line(record: dict[str, Any]) -> bytes:
    """As docs/resume.md has it: a CRC-32 and JSON."""
    text = json.dumps(record).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def wrote(start: int, data: bytes, file: str = FILE) -> dict[str, Any]:
    """The record of bytes that were written without gaps."""
    return {"wrote": [[file, start, len(data), 0, 1, zlib.crc32(data)]]}


def write(partial: Path, lines: Sequence[bytes], name: str = NAME) -> None:
    (partial / ".journal").mkdir(exist_ok=True)
    (partial / ".journal" / name).write_bytes(b"".join(lines))


def counted(
    partial: Path, *names: str, boots: Sequence[tuple[str, str]] = (HERE,), gone: Sequence[str] = ()
) -> ResumeState:
    """What counts of some journals where ranks of these machines read them, and these files are gone."""
    return resume_state_of([read_journal(partial, name, boots) for name in names or (NAME,)], gone)


def test_the_lines_of_a_machine_that_has_not_been_started_anew_count_without_a_mark(tmp_path: Path) -> None:
    write(tmp_path, [line(HEAD), line(wrote(0, b"abcd")), line(wrote(8, b"ijkl"))])
    assert counted(tmp_path).written == (
        (Window(FILE, 0, 4), zlib.crc32(b"abcd")),
        (Window(FILE, 8, 4), zlib.crc32(b"ijkl")),
    )


@pytest.mark.parametrize(
    "boots",
    [[("node7", "f2c1")], [("node8", "e1b0")], [("node8", "a0a0")], []],
    ids=["started anew", "another machine of the same boot", "another machine", "no machine"],
)
def test_of_any_other_machine_the_lines_before_its_last_mark_count(
    boots: list[tuple[str, str]], tmp_path: Path
) -> None:
    first = [line(HEAD), line(wrote(0, b"abcd"))]
    second = [line({"mark": sum(map(len, first))}), line(wrote(8, b"ijkl"))]
    third = [line({"mark": sum(map(len, first + second))}), line(wrote(16, b"qrst"))]
    write(tmp_path, first)
    assert counted(tmp_path, boots=boots).written == ()
    write(tmp_path, first + second)
    assert [window.offset_bytes for window, _ in counted(tmp_path, boots=boots).written] == [0]
    write(tmp_path, first + second + third)
    assert [window.offset_bytes for window, _ in counted(tmp_path, boots=boots).written] == [0, 8]


def test_a_line_that_was_written_while_its_mark_was_made_is_not_behind_it(tmp_path: Path) -> None:
    first = [line(HEAD), line(wrote(0, b"abcd"))]
    write(tmp_path, [*first, line(wrote(8, b"ijkl")), line({"mark": sum(map(len, first))})])
    assert [window.offset_bytes for window, _ in counted(tmp_path, boots=[]).written] == [0]


def test_a_mark_stands_for_the_lines_that_were_there_when_it_was_begun(
    tmp_path: Path, here: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".journal").mkdir()
    (tmp_path / FILE).write_bytes(bytes(12))
    journal = Journal(here, 1, 0)
    journal.wrote([(Window(FILE, 0, 4), zlib.crc32(b"abcd"))])
    fdatasync = os.fdatasync
    late = [(Window(FILE, 8, 4), zlib.crc32(b"ijkl"))]

    def written_meanwhile(descriptor: int) -> None:
        fdatasync(descriptor)
        if late:  # another thread's block, written after the file's data were forced to the disk
            journal.wrote([late.pop()])

    monkeypatch.setattr(os, "fdatasync", written_meanwhile)
    journal.mark()
    assert [window.offset_bytes for window, _ in counted(tmp_path, boots=[]).written] == [0]
    journal.mark()
    assert [window.offset_bytes for window, _ in counted(tmp_path, boots=[]).written] == [0, 8]
    journal.close()


def test_a_machine_that_has_no_name_of_its_boot_is_believed_up_to_its_mark_only(tmp_path: Path) -> None:
    write(tmp_path, [line(HEAD | {"boot": ""}), line(wrote(0, b"abcd"))])
    assert counted(tmp_path, boots=[("node7", "")]).written == ()


TORN = {
    "cut short": lambda whole: whole[:-9] + b"\n",
    "with another digit": lambda whole: whole.replace(b"8, 4", b"9, 4"),
    "of zeros": lambda whole: bytes(len(whole) - 1) + b"\n",
    "without a checksum": lambda whole: whole[9:],
    "empty": lambda whole: b"\n",
}


@pytest.mark.parametrize("name", TORN)
def test_a_line_that_was_torn_does_not_count_and_those_behind_it_do(name: str, tmp_path: Path) -> None:
    torn = TORN[name](line(wrote(8, b"ijkl")))
    write(tmp_path, [line(HEAD), line(wrote(0, b"abcd")), torn, line(wrote(16, b"qrst"))])
    assert [window.offset_bytes for window, _ in counted(tmp_path).written] == [0, 16]


@pytest.mark.parametrize("missing_bytes", [1, 9])
def test_a_last_line_that_has_not_come_to_its_end_does_not_count(missing_bytes: int, tmp_path: Path) -> None:
    write(tmp_path, [line(HEAD), line(wrote(0, b"abcd")), line(wrote(8, b"ijkl"))[:-missing_bytes]])
    assert [window.offset_bytes for window, _ in counted(tmp_path).written] == [0]


def test_of_a_journal_whose_head_was_torn_only_what_is_marked_counts(tmp_path: Path) -> None:
    torn = b"?" + line(HEAD)[1:]
    marked = [torn, line(wrote(0, b"abcd"))]
    write(tmp_path, [*marked, line(wrote(8, b"ijkl")), line({"mark": sum(map(len, marked))})])
    assert [window.offset_bytes for window, _ in counted(tmp_path).written] == [0]


def test_an_empty_journal_says_nothing(tmp_path: Path) -> None:
    write(tmp_path, [])
    assert counted(tmp_path) == ResumeState()


def test_after_a_forced_write_that_failed_nothing_counts_of_that_file_up_to_that_run(tmp_path: Path) -> None:
    write(tmp_path, [line(HEAD), line(wrote(0, b"abcd")), line(wrote(0, b"x", "other"))])
    write(
        tmp_path,
        [line(HEAD | {"run": 2}), line(wrote(8, b"ijkl")), line({"lost": FILE, "until": 2})],
        "run-00002-rank-00001",
    )
    write(tmp_path, [line(HEAD | {"run": 3}), line(wrote(16, b"qrst"))], "run-00003-rank-00000")
    written = counted(tmp_path, NAME, "run-00002-rank-00001", "run-00003-rank-00000").written
    assert [(window.file, window.offset_bytes) for window, _ in written] == [("other", 0), (FILE, 16)]


def test_nothing_counts_of_a_file_that_is_gone(tmp_path: Path) -> None:
    write(tmp_path, [line(HEAD), line(wrote(0, b"abcd")), line(wrote(0, b"x", "other"))])
    assert [window.file for window, _ in counted(tmp_path, gone=[FILE]).written] == ["other"]


@pytest.mark.parametrize("kind", ["overflowed", "rounded_norms"])
def test_values_that_a_cast_changed_count_once_for_a_block_and_together_for_a_tensor(kind: str, tmp_path: Path) -> None:
    def changed(tensor: str, place: int, values: int) -> bytes:
        return line({kind: ["model_optim_rng.pt", tensor, place, 4, 8, values]})

    write(tmp_path, [line(HEAD), changed("a", 0, 3), changed("a", 64, 2), changed("b", 0, 7)])
    write(tmp_path, [line(HEAD | {"run": 2}), changed("a", 64, 2)], "run-00002-rank-00000")  # read again after a kill
    resume_state = counted(tmp_path, NAME, "run-00002-rank-00000")
    assert resume_state.changed[kind] == {"a": 5, "b": 7}


def test_windows_that_follow_each_other_are_one_with_the_checksum_of_all_their_bytes() -> None:
    parts = [(Window(FILE, 8, 4), zlib.crc32(b"ijkl")), (Window(FILE, 0, 8), zlib.crc32(b"abcdefgh"))]
    assert joined(parts) == [(Window(FILE, 0, 12), zlib.crc32(b"abcdefghijkl"))]


def test_checksums_of_more_than_four_gibibytes_combine() -> None:
    # With 5 GiB of zeros, zlib.crc32(zeros) is 423114947 and zlib.crc32(zeros, 0x12345678) is 243993493.
    parts = [(Window(FILE, 0, 4), 0x12345678), (Window(FILE, 4, 5 << 30), 423114947)]
    assert joined(parts) == [(Window(FILE, 0, 4 + (5 << 30)), 243993493)]


@pytest.mark.parametrize(
    "second",
    [
        (Window(FILE, 5, 4), 1),
        (Window("other", 4, 4), 1),
        (Window(FILE, 4, 4, 16, 2), None),
        (Window(FILE, 4, 4), None),
    ],
    ids=["a byte between them", "another file", "gaps", "no checksum"],
)
def test_what_does_not_follow_or_has_no_checksum_stays_apart(second: tuple[Window, int | None]) -> None:
    first = (Window(FILE, 0, 4), zlib.crc32(b"abcd"))
    assert sorted(joined([second, first]), key=str) == sorted([first, second], key=str)


def test_a_run_has_the_number_after_the_last_that_left_a_journal(tmp_path: Path) -> None:
    assert (journals(tmp_path), last_run([])) == ([], 0)
    for name in ("run-00002-rank-00000", "run-00010-rank-00001", "run-00009-rank-00000"):
        write(tmp_path, [], name)
    (tmp_path / ".journal" / "identity.json").touch()
    names = journals(tmp_path)
    assert names == ["run-00002-rank-00000", "run-00009-rank-00000", "run-00010-rank-00001"]
    assert last_run(names) == 10
