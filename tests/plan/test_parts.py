"""Parts of a weight whose shards have unequal numbers of copies, among ranks that see different files."""

from __future__ import annotations

import random

import pytest

from dist_convert.formats.megatron.grid import Grid
from dist_convert.models.schema import Architecture
from dist_convert.plan.file_owners import with_parts
from tests.plan import headers

SEQUENTIAL = headers.layer_shapes


def grouped_layer_shapes(a: Architecture, grid: Grid, prefix: str) -> headers.Shapes:
    """`headers.layer_shapes` with all experts of a rank in two weights, which lie transposed."""
    shapes = {name: shape for name, shape in SEQUENTIAL(a, grid, prefix).items() if ".local_experts." not in name}
    experts, columns = a.experts // grid.expert, a.ffn // grid.expert_tensor
    shapes[f"{prefix}mlp.experts.weight1"] = (a.hidden, experts * 2 * columns)
    shapes[f"{prefix}mlp.experts.weight2"] = (experts * columns, a.hidden)
    return shapes


@pytest.mark.parametrize("seed", range(40))
def test_members_that_see_different_sources_agree_on_parts_with_unequal_numbers_of_copies(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, "layer_shapes", grouped_layer_shapes)
    draw = random.Random(seed)
    grid = Grid(tensor=draw.choice([4, 8]), expert_tensor=2)  # a shard of experts on two or four tensor ranks
    model = headers.architecture(
        layers=1, hidden=2048, ffn=8192, heads=16, query_groups=8, head_dim=128, vocab=32000, padded_vocab=32256,
        experts=4,
    )  # fmt: skip
    made = headers.shards(model, grid)
    to_hf = headers.plan_to_huggingface(made, model, max_shard_size_bytes=100_000_000)
    back = headers.plan_to_megatron(to_hf, made, model)
    nodes = [0] * draw.choice([2, 3]) + [1]
    sources = sorted({file for one in back.transfers for files in one.source_files for file in files})
    visible: list[set[str]] = [set() for _ in nodes]
    for file in sources:
        for rank in draw.sample(range(len(nodes)), draw.choice([1, 2])):
            visible[rank].add(file)
    targets = sorted(file.name for file in back.files)
    of_nodes = [set(draw.sample(targets, len(targets) // 2))]
    of_nodes.append(set(targets) - of_nodes[0])
    writable = [frozenset(of_nodes[node]) for node in nodes]
    divided_plan = headers.plan(
        with_parts(back, writable), [frozenset(files) for files in visible], "gather", writable=writable
    )
    assert headers.faults_of(divided_plan) == []
