"""Who works with whom: whatever each rank sees, groups are disjoint and every byte is dealt exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_convert.errors import MissingShard, UsageError
from dist_convert.formats.megatron.grid import Grid
from dist_convert.plan.content import Content
from dist_convert.plan.plan import Limits, check_groups
from dist_convert.plan.steps import bytes_of, messages, received_bytes
from tests.plan import headers
from tests.plan.headers import architecture, content, everyone, faults_of, files_of, plan

#: Large enough that matrices are several blocks of 4 MiB; only headers are made.
TP2_PP2 = Grid(tensor=2, pipeline=2, expert_tensor=2)
ETP1 = Grid(tensor=2, expert=4, expert_tensor=1)
LLAMA = content(
    architecture(
        layers=2, hidden=1024, ffn=4096, heads=16, query_groups=8, head_dim=64, vocab=32000, padded_vocab=32256
    ),
    TP2_PP2,
)
MIXTRAL = content(
    architecture(
        layers=2, hidden=1024, ffn=2048, heads=16, query_groups=8, head_dim=64, vocab=32000, padded_vocab=32256,
        experts=4,
    ),
    Grid(tensor=2, expert=2, expert_tensor=2),
)  # fmt: skip
MIXTRAL_ETP1 = content(MIXTRAL.ends.target.architecture, ETP1)
CONTENTS = {"Llama TP2 PP2": LLAMA, "Mixtral TP2 EP2": MIXTRAL, "Mixtral TP2 EP4 ETP1": MIXTRAL_ETP1}
contents = pytest.mark.parametrize("made", CONTENTS.values(), ids=CONTENTS.keys())


def own_shards(made: Content, ranks: Sequence[int], world: int) -> list[frozenset[str]]:
    """Rank `ranks[n]` sees the n-th file and no other, and so on round the files."""
    files = files_of(made)
    seen = [frozenset[str]()] * world
    for number, rank in enumerate(ranks):
        seen[rank] = frozenset([files[number % len(files)]])
    return seen


def written_bytes(made: Content, visible: Sequence[frozenset[str]], placement: str) -> list[int]:
    """What each rank writes."""
    return [
        sum(end - start for _, start, end in headers.written_intervals(steps, member))
        for _, member, steps in headers.steps_by_rank(plan(made, visible, placement))
    ]


@contents
@pytest.mark.parametrize("placement", ["gather", "direct"])
@pytest.mark.parametrize("world", range(1, 10))
def test_ranks_that_all_see_all_write_every_byte_once(made: Content, world: int, placement: str) -> None:
    assert faults_of(plan(made, everyone(made, world), placement)) == []
    assert sum(written_bytes(made, everyone(made, world), placement)) == made.moved_bytes


@contents
def test_ranks_that_see_only_their_own_shard_write_every_byte_once_in_any_order_of_ranks(made: Content) -> None:
    for ranks in permutations(range(4)):
        assert faults_of(plan(made, own_shards(made, ranks, 4), "gather")) == []


@contents
def test_a_rank_with_its_own_shard_is_needed_by_its_tensor_parallel_set_alone(made: Content) -> None:
    groups = [group.ranks for group in plan(made, own_shards(made, range(4), 4), "gather").groups]
    if made is LLAMA:
        # Files by tensor rank, then pipeline rank: 00_000, 00_001, 01_000, 01_001.
        assert groups == [(0, 2), (1, 3)]
    elif made is MIXTRAL:
        assert groups == [(0, 2), (1, 3)]
    else:
        # Files 00_000, 00_002, 01_001, 01_003: any pair of both tensor ranks holds the dense parameters.
        assert sorted(rank for group in groups for rank in group) == [0, 1, 2, 3]


@contents
@pytest.mark.parametrize("world", [5, 7, 8, 9])
def test_more_ranks_than_shards_share_the_shards_that_several_of_them_see(made: Content, world: int) -> None:
    assert faults_of(plan(made, own_shards(made, range(world), world), "gather")) == []


@contents
@pytest.mark.parametrize("first", [(0, 1), (0, 2), (0, 3)])
@pytest.mark.parametrize("each", [1, 3])
def test_two_nodes_with_half_the_shards_each_write_every_byte_once(
    made: Content, first: tuple[int, int], each: int
) -> None:
    files = files_of(made)
    half = frozenset(files[number] for number in first)
    visible = [half] * each + [frozenset(files) - half] * each
    assert faults_of(plan(made, visible, "gather")) == []


def test_nodes_that_hold_whole_tensor_parallel_sets_do_not_gather_with_each_other() -> None:
    files = files_of(LLAMA)
    stages = [frozenset(f for f in files if f"_{stage:03d}/" in f) for stage in range(2)]
    visible = [stages[0], stages[1], stages[0], stages[1]]
    assert [group.ranks for group in plan(LLAMA, visible, "gather").groups] == [(0, 2), (1, 3)]
    assert faults_of(plan(LLAMA, visible, "direct")) == []


def test_nodes_that_hold_one_tensor_rank_each_gather_with_each_other() -> None:
    files = files_of(LLAMA)
    ranks = [frozenset(f for f in files if f.startswith(f"mp_rank_{tensor:02d}")) for tensor in range(2)]
    assert [group.ranks for group in plan(LLAMA, ranks, "gather").groups] == [(0, 1)]


def test_a_group_of_more_ranks_than_a_weight_has_pieces_can_be_refused() -> None:
    one, other, third, fourth = files_of(LLAMA)  # both tensor ranks of each stage
    check_groups(plan(LLAMA, [frozenset([one, third]), frozenset([other, fourth])], "gather"))
    scattered = [frozenset([one, fourth]), frozenset([other]), frozenset([third])]
    with pytest.raises(UsageError, match="the nodes' own disks hold chunks") as caught:
        check_groups(plan(LLAMA, scattered, "gather"))
    assert (caught.value.found, "at most 2 ranks" in caught.value.expected) == ("a group of 3", True)


def test_a_group_that_gathers_all_of_a_weight_has_it_as_one_share() -> None:
    files = files_of(LLAMA)
    ranks = [frozenset(f for f in files if f.startswith(f"mp_rank_{tensor:02d}")) for tensor in range(2)]
    (group,) = plan(LLAMA, ranks, "gather").groups
    assert [(one.transfer, one.first_byte, one.end_byte) for one in group.together] == [
        (number, 0, one.size_bytes)
        for number, one in enumerate(LLAMA.transfers)
        if one.stretches == (((0, 1), one.size_bytes),)  # each row lies in both shards
    ]


def test_ranks_that_see_all_are_split_into_groups_as_large_as_a_tensor_parallel_set() -> None:
    assert [group.ranks for group in plan(LLAMA, everyone(LLAMA, 8), "gather").groups] == [
        (0, 1),
        (2, 3),
        (4, 5),
        (6, 7),
    ]
    assert [group.ranks for group in plan(LLAMA, everyone(LLAMA, 3), "gather").groups] == [(0,), (1, 2)]
    assert [group.ranks for group in plan(LLAMA, everyone(LLAMA, 1), "gather").groups] == [(0,)]


def test_ranks_of_which_several_see_the_same_shard_are_split_into_groups_that_see_a_whole_set_each() -> None:
    # Files 00_000, 00_001, 01_000, 01_001: ranks 0 and 4 see the first one, 2 and 6 that of the other tensor rank.
    visible = own_shards(LLAMA, range(8), 8)
    assert [group.ranks for group in plan(LLAMA, visible, "gather").groups] == [(0, 2), (1, 3), (4, 6), (5, 7)]


def test_a_rank_that_sees_nothing_has_a_group_and_no_work() -> None:
    visible = [frozenset[str](), *everyone(LLAMA, 2)]
    assert faults_of(plan(LLAMA, visible, "gather")) == []
    assert written_bytes(LLAMA, visible, "gather")[0] == 0


@pytest.mark.parametrize("name", CONTENTS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_whatever_ranks_see_as_long_as_together_they_see_all_every_byte_is_written_once(
    name: str, data: st.DataObject
) -> None:
    made = CONTENTS[name]
    files = files_of(made)
    visible = data.draw(st.lists(st.frozensets(st.sampled_from(files)), min_size=1, max_size=6))
    unseen = set(files).difference(*visible)
    visible[data.draw(st.integers(0, len(visible) - 1))] |= unseen
    assert faults_of(plan(made, visible, "gather")) == []


@pytest.mark.parametrize("world", [4, 6])
def test_a_target_file_with_the_name_of_a_source_file_makes_nobody_see_that(world: int) -> None:
    made = headers.content_between(LLAMA.ends.target.architecture, Grid(4, expert_tensor=4), Grid(2, expert_tensor=2))
    sources = [f"mp_rank_{number:02d}/model_optim_rng.pt" for number in range(4)]
    assert sources[:2] == [file.name for file in made.files]
    visible = [frozenset([sources[rank % 4]]) for rank in range(world)]
    assert faults_of(plan(made, visible, "gather")) == []


def test_a_shard_that_no_rank_sees_is_named() -> None:
    files = files_of(LLAMA)
    with pytest.raises(MissingShard) as error:
        plan(LLAMA, [frozenset(files[:3])] * 2, "gather")
    assert error.value.expected == files[3]


def test_direct_placement_is_refused_where_no_rank_sees_a_whole_tensor_parallel_set() -> None:
    with pytest.raises(UsageError, match="use --placement gather"):
        plan(LLAMA, own_shards(LLAMA, range(4), 4), "direct")


@contents
@pytest.mark.parametrize(("placement", "world"), [("direct", 4), ("direct", 7), ("gather", 4), ("gather", 8)])
def test_ranks_write_about_equally_much(made: Content, placement: str, world: int) -> None:
    written = written_bytes(made, everyone(made, world), placement)
    # A rank's share may end anywhere in a block of 4 MiB, of a whole of 200 MB.
    assert max(written) <= sum(written) / world + 2 * (4 << 20)


@pytest.mark.parametrize(("placement", "world"), [("direct", 4), ("direct", 7), ("gather", 4), ("gather", 8)])
def test_ranks_read_and_write_about_equally_much_where_some_weights_are_written_to_several_shards(
    placement: str, world: int
) -> None:
    made = headers.content_to_megatron(MIXTRAL_ETP1.ends.target.architecture, ETP1)
    visible = [frozenset(file for one in made.transfers for files in one.source_files for file in files)] * world
    read, written = [0] * world, [0] * world
    for rank, member, steps in headers.steps_by_rank(plan(made, visible, placement)):
        read[rank], written[rank] = map(sum, zip(*(bytes_of(step, member) for step in steps), strict=True))
    assert (sum(read), sum(written)) == (245_393_408, 390_176_768)
    # Attention and embeddings go to two or four files: a block of 4 MiB to as many places.
    assert max(read) <= sum(read) / world + 2 * (4 << 20)
    assert max(written) <= sum(written) / world + 2 * 2 * (4 << 20)


def test_the_more_ranks_see_each_shard_the_less_each_of_them_receives_from_an_all_gather() -> None:
    made = content(replace(LLAMA.ends.target.architecture, layers=16), TP2_PP2)
    totals_bytes = []
    for world in (4, 8, 16):
        divided = plan(made, own_shards(made, range(world), world), "gather")
        _, member, steps = next(headers.steps_by_rank(divided))
        gathered = Limits(0, members=len(divided.groups[0].ranks), on_accelerator=True)
        totals_bytes.append(sum(received_bytes(step, messages(step), member, gathered) for step in steps))
    # What is cut along columns, of the eight layers of a stage: output and down projections.
    whole_bytes = 8 * 2 * (1024 * 1024 + 1024 * 4096)
    assert totals_bytes == [whole_bytes, whole_bytes // 2, whole_bytes // 4]
