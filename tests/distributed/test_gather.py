"""Gathers carry raw bytes, in the order of the members, within any group; nobody stands still for a late member."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import Grid, make
from tests.converting import assert_same, convert, read_tensors
from tests.distributed.interrupting import Runs
from tests.distributed.launching import run_ranks
from tests.distributed.programs.gather_patterns import GROUPS, SIZES_BYTES
from tests.distributed.small_sources import LLAMA


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory where three ranks left what they received."""
    directory = tmp_path_factory.mktemp("gathered")
    run = run_ranks(3, str(directory), module="tests.distributed.programs.gather_patterns")
    assert run.returncode == 0, run.stderr
    return directory


@pytest.mark.parametrize(("group", "rank"), [(group, rank) for group, ranks in GROUPS.items() for rank in ranks])
def test_every_member_receives_every_members_bytes_unchanged_and_in_order(
    group: str, rank: int, gathered: Path
) -> None:
    first_bytes = {0: 0, 1: 85, 2: 170}
    expected = b"".join(
        bytes((first_bytes[member] + i) % 256 for i in range(size_bytes))
        for size_bytes in SIZES_BYTES
        for member in GROUPS[group]
    )
    assert (gathered / f"{group}-{rank}").read_bytes() == expected


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_every_rank_knows_every_ranks_json_values_by_rank(rank: int, gathered: Path) -> None:
    values = [{"rank": 0, "text": ""}, {"rank": 1, "text": "ü"}, {"rank": 2, "text": "üü"}]
    assert (gathered / f"objects-{rank}").read_text() == repr(values)


def work_of_some(directory: Path, failing: int = -1) -> list[Any]:
    """When each of three ranks ended its work and returned, or what it said; the first and the last of them work."""
    run = run_ranks(3, str(directory), str(failing), module="tests.distributed.programs.work_of_some")
    assert run.returncode == 0, run.stderr
    return [json.loads((directory / str(rank)).read_text()) for rank in range(3)]


def test_all_ranks_return_when_the_last_that_works_is_done_though_a_collective_waits_less(tmp_path: Path) -> None:
    (first, _), (never, _), (last, _) = times = work_of_some(tmp_path)
    assert never == 0 < first < last
    assert min(returned for _, returned in times) >= last


def test_a_rank_whose_work_fails_says_so_and_the_others_do_not_return(tmp_path: Path) -> None:
    assert work_of_some(tmp_path, failing=2) == ["lost contact with another rank"] * 2 + ["the work failed"]


def test_while_a_member_is_late_the_others_read_and_write_what_needs_nothing_of_it(runs: Runs, tmp_path: Path) -> None:
    make(tmp_path / "megatron", LLAMA, Grid(tp=2))
    for rank, shard in enumerate(("mp_rank_00", "mp_rank_01")):
        (tmp_path / f"rank{rank}").mkdir()
        (tmp_path / f"rank{rank}" / shard).symlink_to(tmp_path / "megatron" / "iter_0000004" / shard)
    words = ["megatron-to-hf", "--load-path", f"{tmp_path}/rank{{rank}}", "--save-path", f"{tmp_path}/gathered"]
    words += ["--placement", "gather", "--device", "cpu"]
    run = runs.do(words, ranks=2, before=["late_member", str(tmp_path / "mark")])
    assert run.exit_codes == [0, 0], run.printed
    assert "the other rank went on" in run.printed
    assert convert(tmp_path / "megatron", tmp_path / "alone") == 0
    assert_same(read_tensors(tmp_path / "gathered"), read_tensors(tmp_path / "alone"))
