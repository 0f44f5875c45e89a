"""Reading, gathering and writing overlap: none of them waits for more than the memory that it needs."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

from dist_convert.read.file_reader import FileReader
from dist_convert.records import View
from dist_convert.write.files import FileWriter
from tests.checkpoints import Model, make
from tests.converting import convert

SEVERAL_STEPS = Model(hidden=256, ffn=64, heads=4, head_dim=64, layers=1, vocab=20000, padded_vocab=20000)


#: Of its four pieces; it is alone.
AFTER_THE_FIRST_STEP = 4


def test_a_step_is_read_while_another_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "in", SEVERAL_STEPS)
    reads, writes = threading.Semaphore(0), itertools.count()
    was_in_time: list[bool] = []
    read, write = FileReader.read_piece, FileWriter.write_piece

    def noting(reader: FileReader, *rest: Any) -> tuple[memoryview, int | None]:
        reads.release()
        return read(reader, *rest)

    def slow_write(writer: FileWriter, *rest: Any) -> int:
        if next(writes) == AFTER_THE_FIRST_STEP:  # two writers would each wait for the other's read
            was_in_time.append(all(reads.acquire(timeout=20) for _ in range(2)))
        return write(writer, *rest)

    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(FileReader, "read_piece", noting)
    monkeypatch.setattr(FileWriter, "write_piece", slow_write)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert was_in_time[0]


@pytest.mark.parametrize(
    ("cores", "budget", "threads"), [(1, "1GB", 1), (3, "1GB", 3), (64, "1GB", 4), (64, "80MB", 3), (64, "30MB", 1)]
)
def test_a_rank_moves_as_many_steps_at_a_time_as_it_has_cores_and_memory_for_up_to_four(
    cores: int, budget: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "in", SEVERAL_STEPS)
    writers: list[FileWriter] = []
    close = FileWriter.close

    def noting(writer: FileWriter) -> None:
        writers.append(writer)
        close(writer)

    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(FileWriter, "close", noting)
    assert convert(tmp_path / "in", tmp_path / "out", "--max-memory-per-rank", budget) == 0
    assert len(writers) == threads


def test_all_that_is_read_is_asked_for_so_many_blocks_ahead_and_once_more_at_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "in", SEVERAL_STEPS)
    asked: list[View] = []
    again: list[View] = []
    ahead: list[int] = []
    read_ahead, read = FileReader.read_ahead, FileReader.read_piece

    def noting(reader: FileReader, view: View) -> None:
        (again if view in asked else asked).append(view)
        read_ahead(reader, view)

    def counting(reader: FileReader, view: View, first_byte: int) -> tuple[memoryview, int | None]:
        assert view in asked
        assert view in again or view == asked[0]
        ahead.extend([len(asked) - 1 - asked.index(view)] if first_byte == 0 else [])
        return read(reader, view, first_byte)

    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})
    monkeypatch.setattr(FileReader, "read_ahead", noting)
    monkeypatch.setattr(FileReader, "read_piece", counting)
    assert convert(tmp_path / "in", tmp_path / "more", "--read-ahead", "9999999") == 0
    assert min(ahead) == 0
    asked.clear()
    again.clear()
    ahead.clear()
    assert convert(tmp_path / "in", tmp_path / "out", "--read-ahead", "2") == 0
    assert len(ahead) == len(asked) > 4
    assert max(ahead) >= 2
