"""Nothing is written twice or not at all, and nothing stored is forgotten: of the target, and of the source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_convert.errors import ConversionError, Problems
from dist_convert.formats.megatron import geometry
from dist_convert.formats.megatron.grid import Grid
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.models import FAMILIES
from dist_convert.models.blocks import MLP
from dist_convert.models.catalog import TensorMeta
from dist_convert.models.llama import LLAMA
from dist_convert.models.schema import Architecture, Family, Row, norm, part
from dist_convert.plan.content import Content, plan_content
from tests import checkpoints
from tests.plan import arrays
from tests.plan.headers import (
    architecture,
    content,
    cover_faults,
    everyone,
    plan,
    plan_to_megatron,
    shards,
    steps_by_rank,
    written_intervals,
)

MIXTRAL = architecture(experts=4, heads=8, query_groups=4)

GRIDS = [
    (architecture(), Grid()),
    (architecture(), Grid(tensor=2, pipeline=2, expert_tensor=2)),
    (architecture(), Grid(pipeline=2, virtual_pipeline=2)),
    (architecture(tied=True), Grid(tensor=2, pipeline=4, expert_tensor=2)),
    (architecture(query_groups=1, heads=2), Grid(tensor=4, expert_tensor=4)),
    (architecture(qkv_bias=True), Grid(tensor=2, expert_tensor=2)),
    (architecture(vocab=5), Grid(tensor=4, expert_tensor=4)),
    (MIXTRAL, Grid(tensor=2, pipeline=2, expert=2, expert_tensor=2)),
    (MIXTRAL, Grid(tensor=2, expert=4, expert_tensor=1)),
]


@pytest.mark.parametrize(("model", "grid"), GRIDS, ids=[str(grid) for _, grid in GRIDS])
def test_every_byte_of_the_target_is_written_once(model: Architecture, grid: Grid) -> None:
    made = content(model, grid)
    alone = plan(made, everyone(made, 1), "direct")
    written = [one for _, member, steps in steps_by_rank(alone) for one in written_intervals(steps, member)]
    assert cover_faults(made, written) == []


@pytest.mark.parametrize(
    ("model", "grid"),
    [
        (checkpoints.Model(), checkpoints.Grid(tp=2, pp=2)),
        (checkpoints.Model(vocab=9), checkpoints.Grid(tp=4)),
        (checkpoints.Model(tied=True), checkpoints.Grid(pp=2, vpp=2)),
        (checkpoints.Model(experts=4), checkpoints.Grid(tp=2, ep=4, etp=1)),
    ],
    ids=str,
)
def test_every_stored_element_is_read_once_from_each_equal_copy_but_for_padding_and_a_tied_head(
    model: checkpoints.Model, grid: checkpoints.Grid
) -> None:
    made = arrays.make(replace(model, dtype=torch.float32), grid)
    source = made.content.ends.source
    assert isinstance(source, TorchCatalog)
    counts = {file: np.zeros(len(numbers), np.int64) for file, numbers in made.source.items()}
    for copy in arrays.copies(made.content):
        for view in copy.sources:
            arrays.seen(counts, view, item_bytes=8)[:] += 1
    expected = {file: np.zeros(len(numbers), np.int64) for file, numbers in made.source.items()}
    shard_rows = model.padded_vocab // grid.tp
    for (file, _), tensors in source.stored.items():
        tensor_rank = int(file.split("_")[2][:2])
        for name, tensor in tensors.items():
            rows = tensor.shape[0]
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                rows = min(rows, max(0, model.vocab - tensor_rank * shard_rows))
            if name == "output_layer.weight" and model.tied:
                rows = 0
            first = tensor.offset_bytes // 4
            expected[file][first : first + rows * tensor.strides[0]] = 1
    for file, wanted in expected.items():
        np.testing.assert_array_equal(counts[file], wanted, err_msg=file)


def test_tensors_of_zeros_are_in_the_target_and_not_moved() -> None:
    made = content(architecture(qkv_bias=True, layers=2))
    assert made.zero_tensors == ("model.layers.0.self_attn.o_proj.bias", "model.layers.1.self_attn.o_proj.bias")
    data_bytes = sum(file.size_bytes - len(file.header) for file in made.files)
    assert data_bytes - made.moved_bytes == 2 * 16 * 2


ALL = (*LLAMA.layer, *LLAMA.dense)


def with_layer(*layer: Row) -> Family:
    """Llama with another table of its layers."""
    return replace(LLAMA, layer=layer, dense=())


def planned(monkeypatch: pytest.MonkeyPatch, family: Family) -> Content:
    monkeypatch.setitem(FAMILIES, "llama", family)
    return content(architecture())


def test_a_table_that_names_a_target_tensor_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = MLP[0].parts[0]
    doubled = replace(MLP[0], parts=(gate, gate))
    layer = tuple(doubled if entry is MLP[0] else entry for entry in ALL)
    with pytest.raises(ConversionError, match=r"mlp\.gate_proj\.weight"):
        planned(monkeypatch, with_layer(*layer))


def test_two_rows_with_one_target_tensor_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tuple(
        norm(entry.megatron, part("model.layers.{layer}.input_layernorm.weight", "hidden")) if entry.is_norm else entry
        for entry in ALL
    )
    with pytest.raises(ConversionError, match=r"input_layernorm\.weight"):
        planned(monkeypatch, with_layer(*layer))


def test_tensors_that_overlap_in_a_shard_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = geometry.shard_boxes

    def overlapping(cut: geometry.CutRow, number: int) -> Iterator[geometry.ShardBox]:
        return (replace(one, inside=replace(one.inside, row=0)) for one in boxes(cut, number))

    monkeypatch.setattr(geometry, "shard_boxes", overlapping)
    with pytest.raises(Problems) as error:
        content(architecture(layers=1))
    names = {problem.tensor for problem in error.value.problems if "covered twice" in problem.found}
    assert names == {"decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.self_attention.linear_qkv.weight"}


def test_heads_that_the_query_groups_do_not_divide_leave_rows_out_and_are_named() -> None:
    with pytest.raises(Problems) as error:
        content(architecture(layers=1, heads=4, query_groups=3))
    assert {problem.tensor for problem in error.value.problems} == {"decoder.layers.0.self_attention.linear_qkv.weight"}
    assert [problem.found for problem in error.value.problems] == [
        "rows are covered up to 15 of 16",  # query rows, five to a group
        "rows are covered up to 39 of 40",  # rows of the shard
    ]


def test_a_vocabulary_beyond_the_rows_of_its_shards_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"embedding\.word_embeddings\.weight"):
        content(architecture(vocab=33, padded_vocab=32))


def test_a_tensor_of_the_target_that_nothing_fills_is_refused() -> None:
    made = shards(architecture())
    [(file, shard)] = made.items()
    norm = shard.chunks[0]["decoder.final_layernorm.weight"]
    more = {**shard.chunks[0], "decoder.other.weight": replace(norm, name="decoder.other.weight")}
    with pytest.raises(ConversionError) as error:
        plan_to_megatron(content(architecture()), {file: replace(shard, chunks=(more,))}, architecture())
    assert (error.value.tensor, error.value.file) == ("decoder.other.weight", file)


def test_a_tensor_that_its_regions_do_not_cover_is_named_though_they_cover_others_of_the_same_geometry() -> None:
    source = content(architecture()).ends.source
    assert isinstance(source, TorchCatalog)
    name = "model.layers.1.mlp.down_proj.weight"
    larger = replace(source, tensors={**source.tensors, name: TensorMeta((32, 24), "BF16")})
    with pytest.raises(Problems) as error:
        plan_content(larger, larger, ())
    assert [(problem.tensor, problem.found) for problem in error.value.problems] == [
        (name, "rows are covered up to 16 of 32")
    ] * 2
