"""Where the time of a conversion goes: seconds by phase at its end, every stretch with `--trace`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dist_convert.move.report import Report, report_text
from dist_convert.move.timeline import Timeline
from tests.checkpoints import Grid, Model, make
from tests.converting import convert

MODEL = Model(layers=2)
#: Of all weights: 2 x 29 x 16 in embedding and head, 1952 in each layer, 16 in the last norm; 2 bytes each.
WEIGHTS_BYTES = 2 * (2 * 29 * 16 + 2 * 1952 + 16)


def stretches(trace: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(trace.read_text()) if event["ph"] == "X"]


def outcome(ranks: int) -> Report:
    profiles = [
        {"moved": 2.0 + rank, "read": 1.0, "gather": 0.5, "place": 0.25, "write": 1.5, "wait": 1.75}
        for rank in range(ranks)
    ]
    return Report(
        10**9,
        0,
        6 * 10**9,
        200_000_000,
        10.0,
        {},
        {},
        tuple(profiles),
        4.0,
        target=Path("/out"),
        files=3,
        size_bytes=6 * 10**9,
    )


def test_a_timeline_adds_up_what_each_phase_takes() -> None:
    timeline = Timeline()
    for _ in range(2):
        with timeline.during("read", "a tensor", 7):
            time.sleep(0.01)
    seconds = timeline.seconds()
    assert 0.02 <= seconds.pop("read") < 1
    assert seconds == {"gather": 0, "place": 0, "write": 0, "wait": 0}


def test_the_end_shows_a_line_for_every_rank_and_the_rate_of_the_slowest() -> None:
    assert report_text(outcome(2), verbose=True).splitlines() == [
        "seconds       moved     read   gather    place    write     wait",
        "rank 0         2.00     1.00     0.50     0.25     1.50     1.75",
        "rank 1         3.00     1.00     0.50     0.25     1.50     1.75",
        "data moved in 3.00 s, 2.00 GB/s; synced to disk in 4.00 s",
        "read 1 GB, wrote 6 GB in 10.0 s, 0.60 GB/s, peak memory of the largest rank 200 MB",
        "done: /out  3 files, 6 GB, 10 s",
    ]


def test_without_verbose_the_end_is_one_line() -> None:
    assert report_text(outcome(2)) == "done: /out  3 files, 6 GB, 10 s"


def test_of_many_ranks_the_end_shows_those_that_took_longest_and_the_mean() -> None:
    shown = report_text(outcome(1024), verbose=True).splitlines()
    assert [line.split()[:3] for line in shown[1:4]] == [["rank", str(n), f"{n + 2}.00"] for n in (1023, 1022, 1021)]
    assert shown[8].split() == ["mean", "513.50", "1.00", "0.50", "0.25", "1.50", "1.75"]
    assert len(shown) == 12


def test_a_trace_holds_every_byte_that_was_read_and_written(tmp_path: Path) -> None:
    make(tmp_path / "megatron", MODEL, Grid(tp=2))
    assert convert(tmp_path / "megatron", tmp_path / "hf", "--trace", str(tmp_path / "trace.json")) == 0
    found = stretches(tmp_path / "trace.json")
    for phase in ("read", "place", "write"):
        of_phase = [event for event in found if event["name"] == phase]
        assert 0 not in {event["tid"] for event in of_phase}  # the main thread plans and waits
        size_bytes = sum(event["args"]["bytes"] for event in of_phase)
        assert size_bytes == WEIGHTS_BYTES if phase != "place" else 0 < size_bytes < WEIGHTS_BYTES
    assert {event["args"]["what"] for event in found if event["name"] == "read"} >= {
        "embedding.word_embeddings.weight",
        "decoder.layers.1.mlp.linear_fc2.weight",
    }


def test_stretches_of_one_thread_follow_each_other_from_the_start_on(tmp_path: Path) -> None:
    make(tmp_path / "megatron", MODEL, Grid(tp=2))
    assert convert(tmp_path / "megatron", tmp_path / "hf", "--trace", str(tmp_path / "trace.json")) == 0
    found = stretches(tmp_path / "trace.json")
    assert all(0 <= event["ts"] < 60e6 for event in found)
    for thread in range(3):
        mine = [event for event in found if event["tid"] == thread]
        for before, after in pairwise(mine):
            assert after["ts"] >= before["ts"] + before["dur"] - 0.2


def test_threads_and_ranks_have_names(tmp_path: Path) -> None:
    make(tmp_path / "megatron", MODEL)
    assert convert(tmp_path / "megatron", tmp_path / "hf", "--trace", str(tmp_path / "trace.json")) == 0
    events = json.loads((tmp_path / "trace.json").read_text())
    named = [(e["name"], e.get("tid"), e["args"]["name"]) for e in events if e["name"].endswith("_name")]
    assert named == [
        ("process_name", None, "rank 0"), ("thread_name", 0, "main"), ("thread_name", 1, "mover_0"),
    ]  # fmt: skip


def test_a_trace_that_cannot_be_made_ends_the_conversion_before_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "megatron", MODEL)
    assert convert(tmp_path / "megatron", tmp_path / "hf", "--trace", str(tmp_path / "nowhere" / "trace.json")) == 2
    assert re.search(r"the trace cannot be written\n +file: .*nowhere/trace.json", capsys.readouterr().err)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("hf")]


@pytest.mark.parametrize("where", ["hf/trace.json", "hf.partial/trace.json"])
def test_a_trace_inside_the_target_is_refused(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "megatron", MODEL)
    assert convert(tmp_path / "megatron", tmp_path / "hf", "--trace", str(tmp_path / where)) == 2
    assert "a path inside of the target" in capsys.readouterr().err


def test_a_file_that_is_no_trace_is_never_replaced_and_an_earlier_trace_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "megatron", MODEL)
    (shard,) = (tmp_path / "megatron").glob("iter_*/mp_rank_00/*.pt")
    before = shard.read_bytes()
    assert convert(tmp_path / "megatron", tmp_path / "hf", "--trace", str(shard)) == 2
    assert "a file that is not a trace" in capsys.readouterr().err
    assert shard.read_bytes() == before
    (tmp_path / "mine.json").write_bytes(b"[\n{}]")
    assert convert(tmp_path / "megatron", tmp_path / "hf", "--trace", str(tmp_path / "mine.json")) == 2
    assert (tmp_path / "mine.json").read_bytes() == b"[\n{}]"
    for target in ("hf", "again"):
        assert convert(tmp_path / "megatron", tmp_path / target, "--trace", str(tmp_path / "trace.json")) == 0
        assert len(stretches(tmp_path / "trace.json")) > 3


@pytest.mark.parametrize("kind", ["link", "dangling link", "second name"])
def test_a_trace_is_written_through_no_link(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "megatron", MODEL)
    assert convert(tmp_path / "megatron", tmp_path / "first", "--trace", str(tmp_path / "theirs.json")) == 0
    before = (tmp_path / "theirs.json").read_bytes()
    if kind == "second name":
        (tmp_path / "trace.json").hardlink_to(tmp_path / "theirs.json")
    else:
        (tmp_path / "trace.json").symlink_to("theirs.json" if kind == "link" else "nothing.json")
    assert convert(tmp_path / "megatron", tmp_path / "hf", "--trace", str(tmp_path / "trace.json")) == 2
    assert "the trace cannot be written" in capsys.readouterr().err
    assert (tmp_path / "theirs.json").read_bytes() == before
    assert not (tmp_path / "nothing.json").exists()


def test_a_trace_inside_the_target_is_refused_where_a_link_leads_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "megatron", MODEL)
    (tmp_path / "hf").mkdir()
    (tmp_path / "link").symlink_to("hf")
    assert convert(tmp_path / "megatron", tmp_path / "hf", "--trace", str(tmp_path / "link" / "trace.json")) == 2
    assert "a path inside of the target" in capsys.readouterr().err


def test_a_trace_on_a_full_disk_ends_and_the_conversion_goes_on(
    tmp_path: Path, make_disk: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "megatron", MODEL)
    trace = make_disk("size=4k") / "trace.json"
    assert convert(tmp_path / "megatron", tmp_path / "hf", "--trace", str(trace)) == 0
    assert f"{trace}: the trace ends before the conversion" in capsys.readouterr().err
