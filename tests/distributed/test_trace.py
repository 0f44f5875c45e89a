"""A trace of several ranks."""

from __future__ import annotations

import json
from pathlib import Path

from tests.checkpoints import Grid, Model, make
from tests.distributed.launching import run_ranks


def test_ranks_of_a_node_share_a_file_and_tell_what_they_gathered(tmp_path: Path) -> None:
    make(tmp_path / "megatron", Model(), Grid(tp=2))
    for rank, shard in enumerate(("mp_rank_00", "mp_rank_01")):
        own = tmp_path / f"rank{rank}"
        own.mkdir()
        (own / shard).symlink_to(tmp_path / "megatron" / "iter_0000004" / shard)
    run = run_ranks(
        2, "megatron-to-hf", "--load-path", f"{tmp_path}/rank{{rank}}", "--save-path", f"{tmp_path}/hf",
        "--device", "cpu", "--trace", f"{tmp_path}/trace.json",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    events = [event for event in json.loads((tmp_path / "trace.json").read_text()) if event["ph"] == "X"]
    assert {(event["pid"], event["name"]) for event in events} >= {
        (rank, phase) for rank in range(2) for phase in ("read", "gather", "place", "write", "wait")
    }
    gathers = [
        (event["pid"], event["args"]["what"], event["args"]["bytes"]) for event in events if event["name"] == "gather"
    ]
    begun = [(rank, size_bytes) for rank, what, size_bytes in gathers if what.startswith("step")]
    ended = [(rank, size_bytes) for rank, what, size_bytes in gathers if what.startswith("the rest of step")]
    assert {rank for rank, _ in begun} == {0, 1}
    assert min(size_bytes for _, size_bytes in begun) > 0
    assert ended == [(rank, 0) for rank, _ in begun]
