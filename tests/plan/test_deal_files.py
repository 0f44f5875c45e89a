"""Weights files on the nodes' own disks: who gets which, and that little of what they hold crosses nodes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_convert.formats.megatron.grid import Grid
from dist_convert.plan.content import Content
from dist_convert.plan.file_owners import deal_files, file_numbers
from dist_convert.plan.plan import Plan
from tests.plan import headers
from tests.plan.headers import FULL_SIZE, architecture, faults_of, files_of, plan_to_huggingface, steps_by_rank

LLAMA_70B = headers.content(*FULL_SIZE["Llama-3.1-70B TP8 PP4"])
STAGES = [frozenset(file for file in files_of(LLAMA_70B) if f"_{stage:03d}/" in file) for stage in range(4)]


def small(max_shard_size_bytes: int = 3000) -> Content:
    """A Llama at TP2 x PP2 in 7 files."""
    sizes = architecture()
    shards = headers.shards(sizes, Grid(tensor=2, pipeline=2, expert_tensor=2))
    return plan_to_huggingface(shards, sizes, max_shard_size_bytes=max_shard_size_bytes)


def divided(made: Content, visible: Sequence[frozenset[str]], disks: Sequence[int]) -> Plan:
    of_disks = deal_files(made, visible, disks)
    return headers.plan(made, visible, "gather", writable=[of_disks[disk] for disk in disks])


def numbers(made: Content, visible: Sequence[frozenset[str]], disks: Sequence[int]) -> list[str]:
    return [file_numbers(made, files) for files in deal_files(made, visible, disks)]


def test_a_file_goes_where_most_of_its_source_is() -> None:
    assert numbers(LLAMA_70B, STAGES, range(4)) == ["1-8", "9-15", "16-22", "23-30"]


def test_where_nodes_hold_equally_much_each_file_goes_to_the_one_with_the_least_to_write() -> None:
    every = frozenset(files_of(LLAMA_70B))
    assert [file.size_bytes // 10**8 for file in LLAMA_70B.files[:8]] == [45, 46, 49, 49, 46, 46, 46, 49]
    assert [dealt[:7] for dealt in numbers(LLAMA_70B, [every] * 3, [0, 1, 2])] == ["1, 4, 8", "2, 5, 7", "3, 6, 9"]


def test_a_node_without_shards_gets_no_file() -> None:
    assert numbers(small(), [frozenset(files_of(small())), frozenset()], [0, 1]) == ["1-7", "none"]


@pytest.mark.parametrize("each", [1, 2, 8])
def test_the_number_of_ranks_on_a_node_changes_nothing(each: int) -> None:
    disks = [disk for disk in range(4) for _ in range(each)]
    assert numbers(LLAMA_70B, [STAGES[disk] for disk in disks], disks) == ["1-8", "9-15", "16-22", "23-30"]


def test_neighbours_lend_a_rank_each_to_what_crosses_them_and_all_others_gather_within_their_node() -> None:
    disks = [rank // 8 for rank in range(32)]
    plan = divided(LLAMA_70B, [STAGES[disk] for disk in disks], disks)
    assert [group.ranks for group in plan.groups] == [
        (0, 1, 2, 3, 4, 5, 6), (7, 15), (8, 9, 10, 11, 12, 13), (14, 23), (16, 17, 18, 19, 20, 21), (22, 31),
        (24, 25, 26, 27, 28, 29, 30),
    ]  # fmt: skip
    for bridge in (1, 3, 5):
        # A file holds layers of two stages, and there is nothing else that crosses.
        assert 0 < sum(one.size_bytes for one in plan.groups[bridge].together) < 5_000_000_000


@pytest.mark.parametrize("each", [8, 64])
def test_groups_of_sixteen_nodes_stay_within_the_memory_that_ranks_have_by_default(each: int) -> None:
    made = headers.content(*FULL_SIZE["Llama-3.1-405B TP8 PP16"])
    stages = [frozenset(file for file in files_of(made) if f"_{stage:03d}/" in file) for stage in range(16)]
    disks = [rank // each for rank in range(16 * each)]
    plan = divided(made, [stages[disk] for disk in disks], disks)  # else an error: BudgetTooSmall
    assert max(len(group.ranks) for group in plan.groups) <= each


def test_ranks_of_nodes_with_one_each_gather_together() -> None:
    assert [group.ranks for group in divided(LLAMA_70B, STAGES, range(4)).groups] == [(0, 1, 2, 3)]


def test_ranks_of_nodes_that_hold_a_tensor_rank_each_gather_in_groups_of_one_of_each_node() -> None:
    ranks = [frozenset(f for f in files_of(small()) if f.startswith(f"mp_rank_{tensor:02d}")) for tensor in range(2)]
    plan = divided(small(), [ranks[0], ranks[0], ranks[1], ranks[1]], [0, 0, 1, 1])
    assert [group.ranks for group in plan.groups] == [(0, 2), (1, 3)]
    assert faults_of(plan) == []


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_nodes_see_every_byte_is_written_once_by_a_rank_that_has_the_file(data: st.DataObject) -> None:
    made = small()
    files = files_of(made)
    seen = data.draw(st.lists(st.frozensets(st.sampled_from(files)), min_size=2, max_size=4))
    seen[0] |= set(files).difference(*seen)
    each = data.draw(st.integers(1, 3))
    disks = [disk for disk in range(len(seen)) for _ in range(each)]
    assert faults_of(divided(made, [seen[disk] for disk in disks], disks)) == []


def test_no_rank_writes_a_file_of_another_node() -> None:
    disks = [0, 0, 1, 1]
    seen = [frozenset(file for file in files_of(small()) if f"_{stage:03d}/" in file) for stage in range(2)]
    visible = [seen[disk] for disk in disks]
    of_disks = deal_files(small(), visible, disks)
    for rank, member, steps in steps_by_rank(divided(small(), visible, disks)):
        written = {file for file, _, _ in headers.written_intervals(steps, member)}
        assert written <= of_disks[disks[rank]]
