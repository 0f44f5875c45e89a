"""Reading, gathering and writing overlap: none of them waits for more than the memory that it needs."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dist_convert.ranks.channel import Channel
from dist_convert.read.file_reader import FileReader
from dist_convert.records import View
from dist_convert.write.files import FileWriter, Written
from tests.checkpoints import Model, make
from tests.converting import convert

SEVERAL_STEPS = Model(hidden=256, ffn=64, heads=4, head_dim=64, layers=1, vocab=20000, padded_vocab=20000)


def test_what_is_read_is_gathered_and_handed_on_while_the_step_before_is_still_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "in", SEVERAL_STEPS)
    second_begun = threading.Event()
    was_in_time: list[bool] = []
    doing, write = Channel.doing, FileWriter.write

    def listening(channel: Channel, what: str) -> None:
        if what == "reading step 2":
            second_begun.set()
        doing(channel, what)

    def slow_write(writer: FileWriter, view: View, packed: memoryview) -> Written:
        was_in_time.append(second_begun.wait(timeout=20))
        return write(writer, view, packed)

    monkeypatch.setattr(Channel, "doing", listening)
    monkeypatch.setattr(FileWriter, "write", slow_write)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert was_in_time[0]


def test_all_that_is_read_is_asked_for_before_so_many_blocks_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "in", SEVERAL_STEPS)
    asked: list[View] = []
    ahead: list[int] = []
    read_ahead, read = FileReader.read_ahead, FileReader.read

    def noting(reader: FileReader, view: View) -> None:
        asked.append(view)
        read_ahead(reader, view)

    def counting(reader: FileReader, view: View, *rest: Any) -> Mapping[str, int]:
        assert view in asked
        ahead.append(len(asked) - 1 - asked.index(view))
        return read(reader, view, *rest)

    monkeypatch.setattr(FileReader, "read_ahead", noting)
    monkeypatch.setattr(FileReader, "read", counting)
    assert convert(tmp_path / "in", tmp_path / "more", "--read-ahead", "9999999") == 0
    assert min(ahead) == 0
    asked.clear()
    ahead.clear()
    assert convert(tmp_path / "in", tmp_path / "out", "--read-ahead", "2") == 0
    assert len(ahead) == len(asked) > 4
    assert max(ahead) >= 2
