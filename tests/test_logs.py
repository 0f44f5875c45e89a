"""What a conversion says on the way: its first and last line, progress where there is no terminal, quiet, JSON."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

import dist_convert
from dist_convert.__main__ import main
from dist_convert.ranks.channel import Channel
from dist_convert.ranks.log import Log
from dist_convert.read.file_reader import Buffer, FileReader
from dist_convert.records import View
from tests.checkpoints import Grid, Model, make

MODEL = Model(layers=1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make(tmp_path / "in", MODEL, Grid(tp=2))
    return tmp_path / "in"


def run(source: Path, *flags: str) -> int:
    paths = [str(source), str(source.parent / "out")]
    return main(["convert", *paths, "--to", "huggingface", "--device", "cpu", *flags])


def test_the_first_line_says_what_becomes_of_what_and_the_last_what_was_made(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source) == 0
    first, *_, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        rf"dist_convert [\d.]+: LlamaForCausalLM, TP2 PP1 VPP1 EP1 ETP2, {source}/iter_\d+ \(torch\) -> "
        rf"{source.parent}/out \(huggingface\), [\d.]+ kB, 1 rank on 1 node, direct placement",
        first,
    )
    assert re.fullmatch(rf"done: {source.parent}/out  1 file, [\d.]+ kB, [\d.]+ s", last)


@pytest.mark.parametrize("flags", [[], ["-v"], ["--verbose"]])
def test_the_times_are_shown_with_verbose_only(
    flags: list[str], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, *flags) == 0
    said = capsys.readouterr().err
    assert ("peak memory of the largest rank" in said) == ("rank 0  " in said) == bool(flags)


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_a_quiet_conversion_says_nothing(flag: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, flag) == 0
    assert capsys.readouterr() == ("", "")


def test_a_quiet_log_still_warns(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(is_quiet=True)
    log.say("note", "a note")
    log.say("note", "warning: look at this")
    assert capsys.readouterr() == ("", "warning: look at this\n")


def test_json_gives_the_plan_of_a_dry_run_and_the_report_of_a_run(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, "--json", "--dry-run") == 0
    plan = json.loads(capsys.readouterr().out)
    (rank,) = plan["ranks"]
    assert list(rank) == [
        "rank", "group", "read_bytes", "received_bytes", "written_bytes", "buffers_bytes", "peak_memory_bytes",
    ]  # fmt: skip
    assert run(source, "--json", "-q") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert (report["read_bytes"], report["written_bytes"]) == (rank["read_bytes"], rank["written_bytes"])
    assert (report["target"], report["files"]) == (f"{source.parent}/out", 1)


def test_a_line_each_interval_says_what_is_done_and_how_far_the_bytes_are(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(interval_seconds=0)
    log.tick("reading headers and planning")
    with log.progress(4000, "converting") as update:
        update(1000)
        log.tick("reading step 1")
    log.tick("renaming the target")
    first, second, third = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d  reading headers and planning", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d  converting  25%  1 kB of 4 kB, [\d.]+ [kMG]?B/s, \d+ s left", second)
    assert re.fullmatch(r"\d\d:\d\d:\d\d  renaming the target", third)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of boxes take a twentieth of a second each."""
    read = FileReader.read

    def read_slowly(
        self: FileReader, view: View, dtype: str, add: int, buffer: Buffer, offset_bytes: int
    ) -> dict[str, int]:
        time.sleep(0.05)
        return read(self, view, dtype, add, buffer, offset_bytes)

    monkeypatch.setattr(FileReader, "read", read_slowly)


COMPARING = r"\d\d:\d\d:\d\d  comparing +\d+%  [\d.]+ k?B of [\d.]+ kB, [\d.]+ k?B/s(, \d+ s left)?"


@pytest.mark.usefixtures("slow_disk")
def test_a_verification_shows_its_progress_as_a_conversion_does(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, "-q") == 0
    paths = [str(source), str(source.parent / "out")]
    assert main(["verify", *paths, "--log-interval", "1", "-q"]) == 0
    out, err = capsys.readouterr()
    assert (out.splitlines()[-1], err) == ("the same model", "")
    assert main(["verify", *paths, "--log-interval", "1"]) == 0
    assert re.search(COMPARING, capsys.readouterr().err)


@pytest.mark.usefixtures("slow_disk")
def test_a_conversion_that_verifies_shows_how_far_the_comparison_is(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(source, "--verify", "--log-interval", "1") == 0
    assert re.search(COMPARING, capsys.readouterr().err)


def test_a_program_hears_of_the_conversion_and_then_of_the_comparison(source: Path) -> None:
    heard: list[tuple[int, int]] = []
    report = dist_convert.convert(
        source,
        source.parent / "out",
        to="huggingface",
        verify="full",
        on_progress=lambda done_bytes, total_bytes: heard.append((done_bytes, total_bytes)),
    )
    converted, compared = sorted({total_bytes for _, total_bytes in heard})
    assert converted == report.written_bytes
    assert compared > 2 * converted  # both sides, and the copies of the norms
    assert [done_bytes for done_bytes, total_bytes in heard if done_bytes == total_bytes] == [converted, compared]


def test_the_second_work_of_a_channel_is_counted_from_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(interval_seconds=0)
    channel = Channel(0, 1, log=log)
    with channel.progress(4000, "converting"):
        channel.add_progress(4000)
    with channel.progress(2000, "comparing"):
        channel.add_progress(500)
        log.tick("comparing")
    channel.close()
    assert "  comparing  25%  500 B of 2 kB, " in capsys.readouterr().err


def test_within_an_interval_there_is_no_second_line(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(interval_seconds=1000)
    log.tick("reading headers and planning")
    assert capsys.readouterr().err == ""


def test_the_channel_shows_progress_while_the_main_thread_is_busy(capsys: pytest.CaptureFixture[str]) -> None:
    channel = Channel(0, 1, log=Log(interval_seconds=0))
    channel.close()
    assert "reading headers and planning" in capsys.readouterr().err


def test_torchruns_error_file_holds_the_message(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = source.parent / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert run(source, "--max-memory-per-rank", "1MB") == 2
    said = json.loads(file.read_text())["message"]
    assert said["message"].startswith("the memory budget does not hold one step")
    assert capsys.readouterr().err.endswith(f"{said['message']}\n")
    assert said["extraInfo"]["timestamp"].isdecimal()
