"""Steps: every member of a group derives the same gathers, and no buffer is ever too small for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_convert.errors import BudgetTooSmall
from dist_convert.formats.megatron.grid import Grid
from dist_convert.formats.torch.shards import Shard
from dist_convert.plan.content import Content
from dist_convert.plan.copies import BLOCK_BYTES
from dist_convert.plan.plan import ALIGNMENT_BYTES, STEP_BYTES, Limits, Plan, limits, schedule_digest
from dist_convert.plan.steps import Step, blocks_alone, blocks_of_group, blocks_of_member
from dist_convert.records import DTYPE_BYTES
from tests.plan.headers import (
    architecture,
    content,
    content_between,
    everyone,
    files_of,
    plan,
    plan_to_huggingface,
    shards,
    steps_by_rank,
    written_intervals,
)

MB = 1_000_000
MODEL = architecture(
    layers=2, hidden=1024, ffn=4096, heads=16, query_groups=8, head_dim=64, vocab=32000, padded_vocab=32256
)
TP4_GRID = Grid(tensor=4, expert_tensor=4)
TP4 = content(MODEL, TP4_GRID)
TP2_PP2 = content(MODEL, Grid(tensor=2, pipeline=2, expert_tensor=2))
TO_FP32 = content(MODEL, TP4_GRID, target_dtype="F32")
TP4_TO_TP2 = content_between(MODEL, TP4_GRID, Grid(tensor=2, expert_tensor=2))
CONTENTS = {"TP4": TP4, "TP2 PP2": TP2_PP2, "TP4 to fp32": TO_FP32}
contents = pytest.mark.parametrize("name", CONTENTS)
budgets = pytest.mark.parametrize("budget_bytes", [100 * MB, 200 * MB, 1000 * MB])


def own(made: Content, world: int) -> list[frozenset[str]]:
    files = files_of(made)
    return [frozenset([files[rank % len(files)]]) for rank in range(world)]


def divisions(made: Content, budget_bytes: int) -> list[Plan]:
    return [
        plan(made, visible, "gather", budget_bytes)
        for visible in (everyone(made, 3), everyone(made, 8), own(made, 4), own(made, 8))
    ]


def crossing(steps: list[Step]) -> list[Step]:
    return [step for step in steps if step.send_bytes]


@contents
@budgets
def test_all_members_of_a_group_derive_the_same_gathers_in_the_same_order(name: str, budget_bytes: int) -> None:
    for divided in divisions(CONTENTS[name], budget_bytes):
        by_group: dict[int, list[Step]] = {}
        for rank, _, steps in steps_by_rank(divided):
            group = divided.group_of(rank)[0]
            assert by_group.setdefault(group, crossing(steps)) == crossing(steps)
        assert any(by_group.values())


def assert_buffers_suffice(divided: Plan, budget_bytes: int) -> None:
    """Every piece lies in its reader's buffer, at an aligned place of its own, and the buffers in the budget."""
    for rank, member, steps in steps_by_rank(divided):
        limit = divided.limits[divided.group_of(rank)[0]]
        assert limit.total_bytes <= budget_bytes
        for step in steps:
            ends = dict.fromkeys(range(limit.members), 0)
            for read in step.reads:
                assert read.offset_bytes % 64 == 0
                assert read.offset_bytes >= ends[read.reader]
                ends[read.reader] = read.offset_bytes + read.size_bytes
            if step.send_bytes:
                assert max(ends.values()) <= step.send_bytes <= min(limit.send_bytes, STEP_BYTES)
                assert step.send_bytes % 4 == 0  # it is sent as int32
            else:
                assert max(ends.values()) == ends[member] <= STEP_BYTES


@contents
@budgets
def test_every_piece_fits_its_reader_s_buffer_and_none_overlap(name: str, budget_bytes: int) -> None:
    for divided in divisions(CONTENTS[name], budget_bytes):
        assert_buffers_suffice(divided, budget_bytes)


@contents
def test_a_step_without_traffic_is_read_and_written_by_the_same_rank(name: str) -> None:
    for divided in divisions(CONTENTS[name], 1000 * MB):
        for _, member, steps in steps_by_rank(divided):
            alone = [step for step in steps if not step.send_bytes]
            assert {write.writer for step in alone for write in step.writes} <= {member}
            assert {read.reader for step in alone for read in step.reads} <= {member}


def movers_of(block: Step) -> set[int]:
    return {read.reader for read in block.reads} | {write.writer for write in block.writes}


@contents
def test_a_member_takes_what_all_move_together_in_one_order_and_what_it_moves_alone(name: str) -> None:
    for divided in divisions(CONTENTS[name], 1000 * MB):
        for number, group in enumerate(divided.groups):
            together = list(blocks_of_group(divided, number))
            for member in range(len(group.ranks)):
                taken = list(blocks_of_member(divided, number, member))
                alone = [block for block in taken if block not in set(together)]
                assert len(set(taken)) == len(taken)
                assert [block for block in taken if block in set(together)] == together
                assert all(movers_of(block) == {member} for block in alone)


def test_where_each_shard_is_one_members_only_what_is_cut_along_columns_is_gathered() -> None:
    divided = plan(TP4, own(TP4, 4), "gather")
    assert [group.ranks for group in divided.groups] == [(0, 1, 2, 3)]
    together = {read.source.tensor.split(".", 3)[-1] for block in blocks_of_group(divided, 0) for read in block.reads}
    assert together == {"self_attention.linear_proj.weight", "mlp.linear_fc2.weight"}


@pytest.mark.parametrize("world", [4, 16, 32])  # with more than 4 a share has some rows of a shard, not all
def test_what_a_member_moves_alone_is_spread_evenly_between_gathers(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_convert.plan.copies.BLOCK_BYTES", 64 << 10)
    made = content(replace(MODEL, layers=4, vocab=3200, padded_vocab=3200), Grid(tensor=4, expert_tensor=4))
    divided = plan(made, own(made, world), "gather")
    for number, group in enumerate(divided.groups):
        for member in range(len(group.ranks)):
            together_bytes = alone_bytes = 0
            passed: list[tuple[int, int]] = []
            for block in blocks_of_member(divided, number, member):
                size_bytes = sum(read.size_bytes for read in block.reads)
                if movers_of(block) == {member}:
                    alone_bytes += size_bytes
                else:
                    together_bytes += size_bytes
                passed.append((alone_bytes, together_bytes))
            parts = [(alone / alone_bytes, together / together_bytes) for alone, together in passed]
            assert all(abs(alone - together) < 0.05 for alone, together in parts)


def test_what_members_move_alone_begins_in_different_layers_for_each() -> None:
    made = content(replace(MODEL, layers=16), Grid(tensor=4, expert_tensor=4))
    divided = plan(made, own(made, 4), "gather")
    begun = []
    for member in range(4):
        names = [block.writes[0].target.tensor for block in blocks_alone(divided, 0, member)]
        begun.append(next(name.split(".")[2] for name in names if "proj" in name))
    assert begun == ["1", "6", "10", "15"]


def test_members_take_turns_in_writing_what_they_gather() -> None:
    ((_, _, steps), *_) = steps_by_rank(plan(TP4, own(TP4, 4), "gather"))
    writers = [write.writer for step in crossing(steps) for write in step.writes]
    assert sorted(Counter(writers).values()) == [1, 1, 2, 2]


@pytest.mark.parametrize("world", [4, 8, 16])
def test_members_read_and_write_about_equally_much_however_many_see_each_shard(world: int) -> None:
    made = content(replace(MODEL, layers=16), Grid(tensor=4, expert_tensor=4))
    read, written = [0] * world, [0] * world
    for rank, member, steps in steps_by_rank(plan(made, own(made, world), "gather")):
        read[rank] = sum(read.size_bytes for step in steps for read in step.reads if read.reader == member)
        written[rank] = sum(end - start for _, start, end in written_intervals(steps, member))
    assert sum(written) == made.moved_bytes
    assert max(read) <= 1.1 * made.moved_bytes / world
    assert max(written) <= 1.1 * made.moved_bytes / world


def test_a_member_reads_only_its_own_columns_of_what_it_gathers() -> None:
    ((_, _, steps), *_) = steps_by_rank(plan(TP4, own(TP4, 4), "gather"))
    for step in crossing(steps):
        for write in step.writes:
            reads = [step.reads[part.read] for part in write.parts]
            assert [read.source.file for read in reads] == [f"mp_rank_0{n}/model_optim_rng.pt" for n in range(4)]
            assert [read.reader for read in reads] == [0, 1, 2, 3]
            assert [read.source.columns * 4 for read in reads] == [write.target.columns] * 4


def test_direct_placement_sends_nothing() -> None:
    for _, _, steps in steps_by_rank(plan(TP4, everyone(TP4, 5), "direct")):
        assert crossing(steps) == []


def least_budget_mb(made: Content, visible: Sequence[frozenset[str]]) -> int:
    """What the refusal of a budget of 1 MB asks for."""
    with pytest.raises(BudgetTooSmall) as error:
        plan(made, visible, "gather", MB)
    return int(error.value.expected.removeprefix("--max-memory-per-rank of at least ").removesuffix("MB"))


@pytest.mark.parametrize("name", [*CONTENTS, "TP4 to TP2"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_least_budget_that_a_refusal_names_holds_every_step_whatever_ranks_see(
    name: str, data: st.DataObject
) -> None:
    made = CONTENTS.get(name, TP4_TO_TP2)
    files = sorted({file for one in made.transfers for alike in one.source_files for file in alike})
    visible = data.draw(st.lists(st.frozensets(st.sampled_from(files), min_size=1), min_size=1, max_size=8))
    visible.append(frozenset(files).difference(*visible))
    least = least_budget_mb(made, visible)
    with pytest.raises(BudgetTooSmall):
        plan(made, visible, "gather", (least - 1) * MB)
    assert_buffers_suffice(plan(made, visible, "gather", least * MB), least * MB)


@pytest.mark.parametrize("members", [2, 3, 7, 64, 1000])
@pytest.mark.parametrize("shards_of_block", [2, 3, 8, 48])
@pytest.mark.parametrize("on_accelerator", [False, True], ids=["CPU", "accelerator"])
def test_the_least_budget_of_any_group_is_accepted(on_accelerator: bool, members: int, shards_of_block: int) -> None:
    least_send_bytes = BLOCK_BYTES // shards_of_block // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    least = Limits(least_send_bytes, members, on_accelerator)
    limit = limits(least.total_bytes, least)
    assert limit.send_bytes >= least_send_bytes
    assert limit.total_bytes <= least.total_bytes


def test_the_budget_holds_an_accelerators_staging_and_pinned_memory_in_powers_of_two() -> None:
    # In KiB: three slots of 4160 read and 3 x 4160 received, pinned as 8192 and 16384; 4160 sent and 12480 received on
    # a card; each of two threads has a step of 4160 and five blocks of 4096. Over gloo there is one slot more, of the
    # step on its way between ranks. Where nothing crosses there are four threads.
    thread = 4160 + 5 * 4096
    pinned = limits(1000 * MB, Limits(1 << 20, 3, on_accelerator=True))
    assert pinned.total_bytes == (3 * (8192 + 16384) + 4160 + 12480 + 2 * thread) << 10
    assert limits(1000 * MB, Limits(1 << 20, 3)).total_bytes == (4 * (4160 + 12480) + 2 * thread) << 10
    assert limits(1000 * MB, Limits(0, 3)).total_bytes == 4 * thread << 10
    for budget_bytes in range(80 * MB, 400 * MB, 7 * MB):
        assert limits(budget_bytes, Limits(1 << 20, 3, on_accelerator=True)).total_bytes <= budget_bytes


def test_the_content_digest_is_the_same_for_any_ranks_placement_and_budget_and_the_schedule_digest_is_not() -> None:
    plans = [
        plan(content(MODEL, TP4_GRID), everyone(TP4, world), placement, budget_bytes)
        for world, placement, budget_bytes in (
            (1, "direct", 1000 * MB), (4, "direct", 1000 * MB), (5, "direct", 1000 * MB),
            (4, "gather", 1000 * MB), (5, "gather", 1000 * MB), (4, "gather", 80 * MB),
        )
    ]  # fmt: skip
    assert len({made.content.digest for made in plans}) == 1
    assert len({schedule_digest(made) for made in plans}) == len(plans)


def test_two_ranks_that_plan_for_themselves_agree() -> None:
    first, second = (plan(content(MODEL, TP4_GRID), everyone(TP4, 4), "gather") for _ in range(2))
    assert schedule_digest(first) == schedule_digest(second)


def test_ranks_of_different_versions_do_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(TP4, everyone(TP4, 4), "gather")
    before = schedule_digest(made)
    monkeypatch.setattr("dist_convert.plan.plan.__version__", "0.0.1")
    assert schedule_digest(made) != before


def test_the_content_digest_tells_another_offset_dtype_or_file_size() -> None:
    made = shards(MODEL, TP4_GRID)
    file, name = "mp_rank_02/model_optim_rng.pt", "decoder.layers.1.mlp.linear_fc2.weight"
    tensor = made[file].chunks[0][name]
    moved = replace(tensor, offset_bytes=tensor.offset_bytes + DTYPE_BYTES[tensor.dtype])
    elsewhere = {**made, file: replace(made[file], chunks=({**made[file].chunks[0], name: moved},))}

    def digest(headers: Mapping[str, Shard], dtype: str | None = None, size: int = 5_000 * MB) -> str:
        return plan_to_huggingface(headers, MODEL, target_dtype=dtype, max_shard_size_bytes=size).digest

    digests = [digest(made), digest(elsewhere), digest(made, "F16"), digest(made, None, 100 * MB)]
    assert digests[0] == TP4.digest
    assert len(set(digests)) == 4
