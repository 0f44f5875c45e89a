"""Targets of which each file is written by one node: whatever else differs, every byte is written once, on its node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_convert.errors import UsageError
from dist_convert.formats.megatron.grid import Grid
from dist_convert.plan.content import Content
from dist_convert.plan.file_owners import file_numbers, with_parts, writable_by_one_node
from dist_convert.plan.plan import Plan, WrittenRanges, divide
from dist_convert.records import View, Window
from tests.plan import headers
from tests.plan.headers import FULL_SIZE, architecture, faults_of, steps_by_rank

LLAMA, TP2_PP2 = architecture(), Grid(tensor=2, pipeline=2, expert_tensor=2)
MIXTRAL, TP2_EP4 = architecture(experts=4), Grid(tensor=2, expert=4, expert_tensor=1)
MODELS = {
    "llama": (LLAMA, TP2_PP2),
    "mixtral": (MIXTRAL, TP2_EP4),
    "a shard of padding": (architecture(vocab=100, padded_vocab=256), TP2_PP2),
}


def to_hf(model: str) -> Content:
    """One of `MODELS`: a Llama at TP2 x PP2 in 7 files, say, or a Mixtral at TP2 x EP4 x ETP1 in 30."""
    sizes, grid = MODELS[model]
    return headers.plan_to_huggingface(headers.shards(sizes, grid), sizes, max_shard_size_bytes=3000)


def to_megatron(model: str, *, repeats: bool = True) -> Content:
    """The way back: `repeats` says whether padding rows of the vocabulary repeat the last one."""
    sizes, grid = MODELS[model]
    return headers.plan_to_megatron(to_hf(model), headers.shards(sizes, grid), sizes, repeat_last_row=repeats)


CONTENTS = {
    "llama to hf": to_hf("llama"), "mixtral to hf": to_hf("mixtral"), "llama to megatron": to_megatron("llama"),
    "mixtral to megatron": to_megatron("mixtral"),
}  # fmt: skip
WITH_HOLES = {"rows of padding left out": to_megatron("llama", repeats=False)}
each_content = pytest.mark.parametrize("name", CONTENTS)
each_content_or_holes = pytest.mark.parametrize("name", CONTENTS | WITH_HOLES)


def sources_of(made: Content) -> list[str]:
    return sorted({file for one in made.transfers for files in one.source_files for file in files})


def everyone(made: Content, nodes: Sequence[int]) -> list[frozenset[str]]:
    return [frozenset(sources_of(made))] * len(nodes)


def dealt(made: Content, visible: Sequence[frozenset[str]], nodes: Sequence[int]) -> tuple[frozenset[str], ...]:
    whole = frozenset(file.name for file in made.files)
    return writable_by_one_node(made, visible, [whole] * len(nodes), [0] * len(nodes), nodes)


def divided(made: Content, visible: Sequence[frozenset[str]], nodes: Sequence[int], placement: str) -> Plan:
    writable = dealt(made, visible, nodes)
    return headers.plan(with_parts(made, writable), visible, placement, writable=writable)


def nodes_that_write(plan: Plan, nodes: Sequence[int]) -> dict[str, set[int]]:
    """By target file, the nodes whose ranks write to it."""
    found: dict[str, set[int]] = {file.name: set() for file in plan.content.files}
    for rank, member, steps in steps_by_rank(plan):
        for file, _, _ in headers.written_intervals(steps, member):
            found[file].add(nodes[rank])
    return found


def of_nodes(made: Content, count: int) -> list[str]:
    """Which files each of some nodes gets that all see the whole source."""
    writable = dealt(made, everyone(made, range(count)), range(count))
    return [file_numbers(made, files) for files in writable]


@pytest.mark.parametrize("nodes", [[0], [0, 0], [0, 1], [0, 0, 1, 1, 1], [0, 1, 2], [0, 0, 1, 1, 2, 2]], ids=str)
@pytest.mark.parametrize("placement", ["direct", "gather"])
@each_content
def test_of_a_shared_source_every_byte_is_written_once_and_every_file_by_one_node(
    name: str, placement: str, nodes: list[int]
) -> None:
    made = CONTENTS[name]
    plan = divided(made, everyone(made, nodes), nodes, placement)
    assert faults_of(plan) == []
    assert all(len(writing) == 1 for writing in nodes_that_write(plan, nodes).values())
    assert all(len({nodes[rank] for rank in group.ranks}) == 1 for group in plan.groups)  # nothing crosses nodes


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_nodes_see_of_the_source_every_byte_is_written_once_and_every_file_by_one_node(
    data: st.DataObject,
) -> None:
    made = CONTENTS[data.draw(st.sampled_from(sorted(CONTENTS)))]
    sources = sources_of(made)
    seen = data.draw(st.lists(st.frozensets(st.sampled_from(sources)), min_size=2, max_size=3))
    seen[0] |= set(sources).difference(*seen)
    nodes = [node for node in range(len(seen)) for _ in range(data.draw(st.integers(1, 3)))]
    plan = divided(made, [seen[node] for node in nodes], nodes, "gather")
    assert faults_of(plan) == []
    assert all(len(writing) == 1 for writing in nodes_that_write(plan, nodes).values())


@each_content_or_holes
def test_parts_move_as_many_bytes_as_the_whole_and_have_its_digest(name: str) -> None:
    made = (CONTENTS | WITH_HOLES)[name]
    parts = with_parts(made, dealt(made, everyone(made, range(4)), range(4)))
    assert len(parts.transfers) > len(made.transfers)
    assert parts.moved_bytes == made.moved_bytes
    assert parts.digest == made.digest


def test_a_shard_of_padding_that_stays_zero_is_nobodys_work() -> None:
    made = to_megatron("a shard of padding", repeats=False)
    nodes = range(4)
    plan = divided(made, everyone(made, nodes), nodes, "direct")
    written = [sum(end - start for _, start, end in headers.written_intervals(s, m)) for _, m, s in steps_by_rank(plan)]
    assert sum(written) == made.moved_bytes


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (3, 2)])
@pytest.mark.parametrize("placement", ["direct", "gather"])
@each_content_or_holes
def test_what_was_written_on_some_nodes_is_gone_on_with_on_others(
    name: str, placement: str, before: int, after: int
) -> None:
    made = (CONTENTS | WITH_HOLES)[name]
    first = divided(made, everyone(made, range(before)), range(before), "direct")
    windows = [
        Window.of(write.target)
        for _, member, steps in steps_by_rank(first)
        for step in steps[::2]
        for write in step.writes
        if write.writer == member
    ]
    written = WrittenRanges.of(windows)
    nodes, visible = range(after), everyone(made, range(after))
    writable = dealt(made, visible, nodes)
    plan = divide(
        with_parts(made, writable), visible, placement=placement, budget_bytes=10**9, writable=writable, written=written
    )
    left_bytes = sum(
        end - start
        for _, member, steps in steps_by_rank(plan)
        for _, start, end in headers.written_intervals(steps, member)
    )
    assert written.size_bytes > 0
    assert written.size_bytes + left_bytes == made.moved_bytes


def test_nodes_that_see_the_same_get_stretches_of_about_as_many_bytes() -> None:
    llama_70b = headers.content(*FULL_SIZE["Llama-3.1-70B TP8 PP4"])
    assert of_nodes(llama_70b, 4) == ["1-7", "8-15", "16-22", "23-30"]
    assert of_nodes(CONTENTS["llama to hf"], 3) == ["1-2", "3-5", "6-7"]


def test_a_node_gets_whole_pipeline_stages_and_within_them_whole_expert_ranks() -> None:
    for content, nodes, digits in (
        (headers.content_to_megatron(LLAMA, TP2_PP2), 2, slice(11, 14)),
        (CONTENTS["mixtral to megatron"], 4, slice(11, 14)),
    ):
        whole = dealt(content, everyone(content, range(nodes)), range(nodes))
        assert [sorted({file[digits] for file in files}) for files in whole] == [[f"{n:03d}"] for n in range(nodes)]


def test_a_file_goes_to_the_node_that_sees_most_of_its_source() -> None:
    llama_70b = headers.content(*FULL_SIZE["Llama-3.1-70B TP8 PP4"])
    stages = [frozenset(file for file in sources_of(llama_70b) if f"_{stage:03d}/" in file) for stage in (1, 0, 3, 2)]
    dealt_files = dealt(llama_70b, stages, range(4))
    assert [file_numbers(llama_70b, files) for files in dealt_files] == ["9-15", "1-8", "23-30", "16-22"]


def test_more_nodes_than_files_leave_some_without_work() -> None:
    assert sorted(of_nodes(CONTENTS["llama to hf"], 9)) == ["1", "2", "3", "4", "5", "6", "7", "none", "none"]


def test_files_of_a_place_where_any_rank_may_write_stay_with_all_of_its_ranks() -> None:
    made = CONTENTS["llama to hf"]
    whole = frozenset(file.name for file in made.files)
    parts = [frozenset(sorted(whole)[:3]), frozenset(sorted(whole)[3:])]
    writable = [parts[0], parts[0], parts[1], parts[1]]
    found = writable_by_one_node(made, everyone(made, range(4)), writable, [-1, -1, 1, 1], range(4))
    assert found[:2] == (parts[0], parts[0])
    assert found[2] | found[3] == parts[1]
    assert not found[2] & found[3]
    assert found[2]
    assert found[3]


def test_direct_placement_is_refused_where_the_node_of_a_file_sees_only_some_of_its_source() -> None:
    made = replace(CONTENTS["llama to hf"])
    stages = [frozenset(file for file in sources_of(made) if f"_{stage:03d}/" in file) for stage in range(2)]
    with pytest.raises(UsageError, match="no rank alone sees all shards") as caught:
        divided(made, stages, range(2), "direct")
    assert caught.value.remedy == "use --placement gather"


def test_a_part_is_done_when_its_own_files_are() -> None:
    made = CONTENTS["llama to megatron"]
    writable = dealt(made, everyone(made, range(2)), range(2))
    parts = with_parts(made, writable)
    first = [Window.of(view) for file in made.files if file.name in writable[0] for view in map(View.of, file.tensors)]
    plan = divide(
        parts, everyone(made, range(2)), placement="direct", budget_bytes=10**9, writable=writable,
        written=WrittenRanges.of(first),
    )  # fmt: skip
    (of_first,), (of_second,) = (group.alone for group in plan.groups)
    assert of_first == ()
    assert of_second
