"""Where each Hugging Face tensor lies in the shards: small examples in full, then every grid against plain reshapes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_convert.compare.elements import check_tensor
from dist_convert.errors import PlanError
from dist_convert.formats.megatron.geometry import CutRow, ShardBox, shard_boxes
from dist_convert.models.blocks import MLP, QKV
from dist_convert.models.schema import EMBEDDING, Row
from dist_convert.plan.copies import BLOCK_BYTES, bands, blocks_of_band
from dist_convert.records import Box
from tests import checkpoints
from tests.plan import arrays

QUERY, KEY, VALUE = 0, 1, 2
GATE, UP = 0, 1


def rows_of(row: Row, sizes: dict[str, int], shards: int, **how: bool) -> list[tuple[int, int, int, int, int]]:
    """(part, first row in the part, shard, first row in the shard, rows) in the order of the shards' rows."""
    cut = CutRow(row, sizes, shards, **how)
    found = [(number, p) for number in range(len(row.parts)) for p in shard_boxes(cut, number)]
    assert all(p.box.columns == p.inside.columns and p.box.column == p.inside.column == 0 for _, p in found)
    assert all(p.box.rows == p.inside.rows for _, p in found)
    in_order = sorted(found, key=lambda one: (one[1].shard, one[1].inside.row))
    return [(number, p.box.row, p.shard, p.inside.row, p.box.rows) for number, p in in_order]


def test_qkv_rows_come_group_by_group_and_a_shard_holds_whole_groups() -> None:
    sizes = {"query": 8, "key_value": 4, "hidden": 3, "query_groups": 2}  # 4 heads of 2 rows, 2 groups
    assert rows_of(QKV, sizes, 2) == [
        (QUERY, 0, 0, 0, 4), (KEY, 0, 0, 4, 2), (VALUE, 0, 0, 6, 2),
        (QUERY, 4, 1, 0, 4), (KEY, 2, 1, 4, 2), (VALUE, 2, 1, 6, 2),
    ]  # fmt: skip


def test_with_fewer_groups_than_shards_a_shard_holds_part_of_a_group() -> None:
    sizes = {"query": 4, "key_value": 2, "hidden": 3, "query_groups": 1}  # 2 heads of 2 rows, 1 group: 8 rows
    assert rows_of(QKV, sizes, 4) == [
        (QUERY, 0, 0, 0, 2), (QUERY, 2, 1, 0, 2), (KEY, 0, 2, 0, 2), (VALUE, 0, 3, 0, 2),
    ]  # fmt: skip


def test_the_border_of_two_shards_may_cut_a_head() -> None:
    sizes = {"query": 2, "key_value": 2, "hidden": 3, "query_groups": 1}  # 1 head of 2 rows: 6 rows
    assert rows_of(QKV, sizes, 2) == [
        (QUERY, 0, 0, 0, 2), (KEY, 0, 0, 2, 1), (KEY, 1, 1, 0, 1), (VALUE, 0, 1, 1, 2),
    ]  # fmt: skip


def test_each_shard_of_a_gated_mlp_holds_its_gate_rows_and_then_its_up_rows() -> None:
    sizes = {"ffn": 4, "hidden": 3, "query_groups": 1}
    assert rows_of(MLP[0], sizes, 2) == [
        (GATE, 0, 0, 0, 2), (UP, 0, 0, 2, 2), (GATE, 2, 1, 0, 2), (UP, 2, 1, 2, 2),
    ]  # fmt: skip


def test_without_interleave_the_stacked_gate_and_up_rows_are_cut_plainly() -> None:
    sizes = {"ffn": 4, "hidden": 3, "query_groups": 1}
    assert rows_of(MLP[0], sizes, 2, is_per_shard=False) == [(GATE, 0, 0, 0, 4), (UP, 0, 1, 0, 4)]


def test_columns_are_cut_into_equal_shards() -> None:
    sizes = {"ffn": 4, "hidden": 3, "query_groups": 1}
    assert list(shard_boxes(CutRow(MLP[2], sizes, 2), 0)) == [
        ShardBox(Box(0, 0, 3, 2), 0, Box(0, 0, 3, 2)),
        ShardBox(Box(0, 2, 3, 2), 1, Box(0, 0, 3, 2)),
    ]


def test_padding_rows_of_the_vocabulary_belong_to_no_tensor_even_where_they_fill_a_shard() -> None:
    sizes = {"vocab": 5, "padded_vocab": 12, "hidden": 3, "query_groups": 1}
    assert CutRow(EMBEDDING[0], sizes, 4).shard_size == (3, 3)
    assert rows_of(EMBEDDING[0], sizes, 4) == [(0, 0, 0, 0, 3), (0, 3, 1, 0, 2)]


@pytest.mark.parametrize(
    ("row", "sizes", "shards"),
    [
        (MLP[0], {"ffn": 5, "hidden": 4}, 2),
        (MLP[0], {"ffn": 6, "hidden": 4}, 4),
        (MLP[2], {"ffn": 5, "hidden": 4}, 2),
        (QKV, {"query": 4, "key_value": 1, "hidden": 4, "query_groups": 1}, 4),
        (EMBEDDING[0], {"vocab": 5, "padded_vocab": 6, "hidden": 4}, 4),
    ],
    ids=["odd gate", "gate and up divide together only", "columns", "query groups", "padded vocabulary"],
)
def test_a_parameter_that_cannot_be_cut_into_equal_shards_is_refused_by_name(
    row: Any, sizes: dict[str, int], shards: int
) -> None:
    with pytest.raises(PlanError, match=f"cannot be cut into {shards} equal shards") as error:
        _ = CutRow(row, sizes, shards).shard_size
    assert error.value.tensor == row.megatron


@st.composite
def models(draw: st.DrawFn, tensor: int, stages: int, experts: int = 0) -> checkpoints.Model:
    """Any small model that the tensor parallel size divides as Megatron demands."""
    groups, heads_per_group, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows, columns = groups * (heads_per_group + 2) * head_dim, groups * heads_per_group * head_dim
    if rows % tensor or columns % tensor:
        head_dim *= tensor
    vocab, padding = draw(st.integers(1, 20)), draw(st.integers(0, 40))
    return checkpoints.Model(
        hidden=draw(st.integers(1, 5)), ffn=tensor * draw(st.integers(1, 3)), heads=groups * heads_per_group,
        groups=groups, head_dim=head_dim, layers=stages * draw(st.integers(1, 2)), vocab=vocab,
        padded_vocab=-(-(vocab + padding) // tensor) * tensor, experts=experts, tied=draw(st.booleans()),
        linear_bias=draw(st.booleans()) and not experts, dtype=torch.float32,
    )  # fmt: skip


def rebuilt(model: checkpoints.Model, grid: checkpoints.Grid, **spelled: str) -> None:
    made = arrays.make(model, grid, **spelled)
    arrays.assert_rebuilt(made, arrays.copies(made.content))
    catalog = arrays.shards_of(made)
    for name, meta in catalog.tensors.items():
        if name in catalog.parameters:
            check_tensor(catalog, name, product(range(meta.rows), range(meta.columns)))


@given(
    data=st.data(),
    grid=st.builds(checkpoints.Grid, tp=st.sampled_from([1, 2, 3, 4]), pp=st.integers(1, 3), vpp=st.integers(1, 2)),
    norms=st.sampled_from(["local", "te", "habana-fused"]),
)
@settings(max_examples=60, deadline=None)
def test_the_copies_of_any_llama_rebuild_every_tensor_and_each_element_lies_where_the_formula_has_it(
    data: st.DataObject, grid: checkpoints.Grid, norms: str
) -> None:
    rebuilt(data.draw(models(grid.tp, grid.pp * grid.vpp)), grid, norms=norms)


EXPERTS = (
    "sequential", "te-grouped", "te-single", "grouped",
    "dynamic", "dynamic-transposed", "dynamic-unfused", "dynamic-transposed-unfused",
)  # fmt: skip

#: TP, EP, ETP: experts split like all else, less, not at all, and by more expert ranks than tensor ranks.
EXPERT_GRIDS = [(1, 1, 1), (2, 1, 2), (1, 4, 1), (2, 2, 2), (2, 4, 1), (4, 2, 2), (4, 4, 1), (4, 2, 4)]


@given(data=st.data(), sizes=st.sampled_from(EXPERT_GRIDS), pp=st.integers(1, 2), experts=st.sampled_from(EXPERTS))
@settings(max_examples=80, deadline=None)
def test_the_copies_of_any_mixtral_rebuild_every_tensor_and_each_element_lies_where_the_formula_has_it(
    data: st.DataObject, sizes: tuple[int, int, int], pp: int, experts: str
) -> None:
    tensor, expert, expert_tensor = sizes
    model = data.draw(models(tensor, pp, experts=expert * data.draw(st.integers(1, 2))))
    rebuilt(model, checkpoints.Grid(tp=tensor, pp=pp, ep=expert, etp=expert_tensor), experts=experts)


@pytest.mark.parametrize("experts", ["sequential", "grouped", "dynamic-transposed-unfused"])
def test_blocks_of_large_tensors_rebuild_them_too(experts: str) -> None:
    model = checkpoints.Model(
        hidden=1030, ffn=1100, layers=1, vocab=2050, padded_vocab=2052, experts=1, dtype=torch.float32
    )
    made = arrays.make(model, checkpoints.Grid(tp=2), experts=experts, max_shard_size_bytes=10_000_000)
    listed = [
        block
        for transfer in made.content.transfers
        for band in bands(made.content.ends, transfer.names)
        for block in blocks_of_band(band, transfer.target_files)
    ]
    assert all(sum(copy.rows * copy.columns * 4 for copy in block) <= BLOCK_BYTES for block in listed)
    assert len(listed) > 2 * len(made.content.transfers)
    arrays.assert_rebuilt(made, (copy for block in listed for copy in block))
