"""Where a target's layers go, and which targets are refused before anything is written."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

from dist_convert.errors import Problems, UsageError
from dist_convert.formats.megatron.grid import Cut, Grid, check_target, stage_layers
from dist_convert.models.schema import Architecture


def stages(layers: int, pipeline: int, virtual: int = 1, **uneven: Any) -> tuple[tuple[int, ...], ...]:
    mtp = uneven.pop("mtp", 0)
    return stage_layers(layers, pipeline, Cut(virtual=virtual, **uneven), mtp=mtp)


#: layers, pipeline, virtual, how it is uneven -> layers of each virtual stage and pipeline rank.
CASES: list[tuple[int, int, int, dict[str, Any], tuple[tuple[int, ...], ...]]] = [
    (5, 1, 1, {}, ((5,),)),
    (8, 4, 1, {}, ((2, 2, 2, 2),)),
    (8, 2, 2, {}, ((2, 2), (2, 2))),
    (32, 4, 2, {}, ((4, 4, 4, 4), (4, 4, 4, 4))),
    (8, 4, 1, {"first": 1, "last": 3}, ((1, 2, 2, 3),)),
    (8, 4, 1, {"first": 2}, ((2, 2, 2, 2),)),
    (10, 4, 1, {"first": 1}, ((1, 3, 3, 3),)),
    (7, 3, 1, {"last": 1}, ((3, 3, 1),)),
    (8, 2, 1, {"first": 3}, ((3, 5),)),
    (8, 2, 1, {"last": 3}, ((5, 3),)),
    (8, 2, 1, {"first": 2, "last": 6}, ((2, 6),)),
    (16, 3, 2, {"first": 4, "last": 8}, ((2, 2, 4), (2, 2, 4))),
    (8, 4, 1, {"layout": "Et*3|(tt|)*2tL"}, ((3, 2, 2, 1),)),
    (8, 4, 1, {"layout": "E,ttt|tt,|tt|t,L"}, ((3, 2, 2, 1),)),
    (4, 2, 2, {"layout": "Et|t|tt|L"}, ((1, 1), (2, 0))),
    (4, 2, 2, {"layout": "E|(tt|)*2L"}, ((0, 2), (2, 0))),
    (3, 3, 1, {"layout": "Ettt||L"}, ((3, 0, 0),)),
    (4, 1, 1, {"layout": "E(tt)*2L"}, ((4,),)),
    (4, 2, 1, {"layout": "Ettt|tm*2L", "mtp": 2}, ((3, 1),)),
]


@pytest.mark.parametrize(("layers", "pipeline", "virtual", "uneven", "expected"), CASES)
def test_layers_are_counted_by_virtual_stage_and_then_by_pipeline_rank(
    layers: int, pipeline: int, virtual: int, uneven: dict[str, Any], expected: tuple[tuple[int, ...], ...]
) -> None:
    assert stages(layers, pipeline, virtual, **uneven) == expected


def test_virtual_stages_follow_from_their_layers_and_embedding_and_loss_may_stand_in_for_one() -> None:
    assert stages(8, 2, layers_each=2) == ((2, 2), (2, 2))
    assert stages(6, 2, layers_each=2, with_embedding=True, with_loss=True) == ((1, 2), (2, 1))


#: Prints what megatron-core builds for each case: its own config, asked for every stage.
MEGATRON = """
import json, sys
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
built = []
for layers, pipeline, virtual, uneven, _ in json.load(sys.stdin):
    parallel_state.set_pipeline_model_parallel_world_size(pipeline)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual if virtual > 1 else None)
    config = TransformerConfig(
        num_layers=layers, hidden_size=8, num_attention_heads=1, pipeline_dtype="bf16",
        pipeline_model_parallel_size=pipeline, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        num_layers_in_first_pipeline_stage=uneven.get("first"), num_layers_in_last_pipeline_stage=uneven.get("last"),
        pipeline_model_parallel_layout=uneven.get("layout"), mtp_num_layers=uneven.get("mtp"),
    )
    chunks = []
    for v in range(virtual):
        chunks.append([])
        for p in range(pipeline):
            parallel_state.set_pipeline_model_parallel_rank(p)
            chunks[-1].append(get_num_layers_to_build(config, vp_stage=v if virtual > 1 else None))
    built.append(chunks)
print(json.dumps(built))
"""


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
def test_megatron_core_builds_the_same_number_of_layers_in_every_chunk() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEGATRON], input=json.dumps(CASES), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == [[list(row) for row in case[-1]] for case in CASES]


@pytest.mark.parametrize(
    ("layers", "pipeline", "virtual", "uneven", "reason"),
    [
        (8, 3, 1, {}, "8 layers are not divisible by 3 pipeline ranks"),
        (2, 4, 1, {}, "2 layers are not divisible by 4 pipeline ranks"),
        (8, 4, 4, {}, "the 2 layers of a pipeline rank are not divisible by 4 virtual stages"),
        (8, 1, 2, {}, "virtual stages need at least 2 pipeline ranks"),
        (8, 4, 1, {"layers_each": 3}, "virtual stages of 3 need a multiple of 12 layers"),
        (8, 4, 1, {"first": 3, "last": 1, "layout": "E|t|t|L"}, "--pipeline-model-parallel-layout excludes"),
        (8, 4, 1, {"first": 1, "last": 2}, "5 remaining layers are not divisible by 2 remaining pipeline ranks"),
        (8, 4, 1, {"first": 9}, "the first and last ranks alone would hold 9 layers"),
        (8, 4, 1, {"first": 4, "last": 4}, "no layers are left for 2 of the pipeline ranks"),
        (8, 2, 1, {"first": 3, "last": 4}, "1 layers are left and no rank between the first and the last"),
        (8, 1, 1, {"last": 8}, "need at least 2 pipeline ranks"),
        (16, 3, 2, {"first": 5, "last": 7}, "the 5 layers of a pipeline rank are not divisible by 2 virtual stages"),
        (4, 2, 1, {"layout": "Ett|tL"}, "the layout has 3 layers (t), the model 4"),
        (4, 2, 1, {"layout": "Ett|t|tL"}, "the layout has 3 stages, --pp times --vpp is 2"),
        (4, 2, 1, {"layout": "tt|EttL"}, "the layout needs one E, at the beginning of its first stage"),
        (4, 2, 1, {"layout": "tE|tttL"}, "the layout needs one E, at the beginning of its first stage"),
        (4, 2, 2, {"layout": "Et|t|ttL|"}, "the layout needs one L, at the end of its last stage"),
        (4, 2, 1, {"layout": "Ett|ttLL"}, "the layout needs one L, at the end of its last stage"),
        (4, 2, 1, {"layout": "Ett|ttmL"}, "the layout has 1 layers of multi-token prediction (m), the model 0"),
        (4, 2, 1, {"layout": "Ett|ttL", "mtp": 1}, "0 layers of multi-token prediction (m), the model 1"),
        (4, 3, 1, {"layout": "Ett|tmt|L", "mtp": 1}, "in one stage, behind the last layer (t)"),
        (4, 3, 1, {"layout": "Ett|ttm|mL", "mtp": 2}, "in one stage, behind the last layer (t)"),
        (4, 2, 2, {"layout": "Ett|ttm||L", "mtp": 1}, "in the last virtual stage of a pipeline rank"),
        (4, 2, 1, {"layout": "Ett|((t)*2)*1L"}, "the layout has '(' ')' beside E, t, m, L"),
        (4, 2, 1, {"layout": "E t|tttL"}, "the layout has ' ' beside E, t, m, L"),
        (4, 2, 1, {"layout": "Et*99999999999|L"}, "the layout describes more than 100000 letters"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused_with_its_reason(
    layers: int, pipeline: int, virtual: int, uneven: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError) as error:
        stages(layers, pipeline, virtual, **uneven)
    assert reason in error.value.found


def test_a_pipeline_of_far_more_stages_than_memory_holds_is_refused() -> None:
    with pytest.raises(UsageError, match="8 layers cannot be divided"):
        stages(8, 100_000, 100_000)


def test_a_wrong_pipeline_is_refused_with_all_reasons_at_once_and_a_remedy() -> None:
    with pytest.raises(UsageError) as error:
        stages(4, 4, layout="ttE|ttt")
    assert str(error.value) == (
        "4 layers cannot be divided over 4 pipeline ranks\n"
        "  found:    the layout has 2 stages, --pp times --vpp is 4; the layout has 5 layers (t), the model 4; "
        "the layout needs one E, at the beginning of its first stage; "
        "the layout needs one L, at the end of its last stage\n"
        "  remedy:   choose a --pp (times --vpp) that divides the layers, or say where they go: "
        "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers, "
        "or --pipeline-model-parallel-layout, e.g. Ett|(ttt|)*2ttL"
    )


def test_the_layout_of_the_remedy_can_be_read() -> None:
    assert stages(10, 4, layout="Ett|(ttt|)*2ttL") == ((2, 3, 3, 2),)


LLAMA = Architecture(
    family="llama", layers=8, hidden=64, ffn=96, heads=8, query_groups=4, head_dim=8, vocab=250, padded_vocab=256,
    max_positions=128, norm_epsilon=1e-5, rope_theta=1e4,
)  # fmt: skip
MIXTRAL = Architecture(**(vars(LLAMA) | {"family": "mixtral", "experts": 8, "experts_per_token": 2}))


@pytest.mark.parametrize(
    ("model", "grid"),
    [
        (LLAMA, Grid()),
        (LLAMA, Grid(tensor=4, pipeline=4, virtual_pipeline=2, expert_tensor=4)),
        (LLAMA, Grid(tensor=8, expert_tensor=8)),  # two ranks to a query group
        (LLAMA, Grid(tensor=2, expert_tensor=5)),  # a model without experts has no expert tensor ranks
        (MIXTRAL, Grid(tensor=4, pipeline=2, expert=8, expert_tensor=1)),
        (MIXTRAL, Grid(tensor=4, expert=2, expert_tensor=2)),
    ],
)
def test_a_target_that_can_exist_is_not_refused(model: Architecture, grid: Grid) -> None:
    check_target(model, grid)


@pytest.mark.parametrize(
    ("change", "grid", "reason"),
    [
        ({"heads": 6, "query_groups": 2}, Grid(tensor=4), "the attention heads cannot be divided over the tensor"),
        ({"ffn": 90}, Grid(tensor=4), "the columns of the MLP cannot be divided over the tensor"),
        ({"padded_vocab": 250}, Grid(tensor=4), "the rows of the padded vocabulary cannot be divided over the tensor"),
        ({"heads": 24, "query_groups": 6}, Grid(tensor=4), "the query groups cannot be divided over the tensor"),
        ({}, Grid(expert=2), "a model without experts cannot have expert parallel ranks"),
        ({"experts": 8}, Grid(expert=3), "the experts cannot be divided over the expert parallel ranks"),
        ({"experts": 8}, Grid(tensor=2, expert_tensor=4), "two expert tensor parallel ranks would share one file name"),
        ({"experts": 8, "ffn": 98}, Grid(4, expert_tensor=4), "the columns of an expert cannot be divided over"),
    ],
)
def test_a_target_that_cannot_exist_is_refused(change: dict[str, Any], grid: Grid, reason: str) -> None:
    with pytest.raises(UsageError) as error:
        check_target(Architecture(**(vars(LLAMA) | change)), grid)
    assert error.value.what.startswith(reason)
    assert error.value.exit_code == 2


def test_a_target_is_refused_with_all_reasons_at_once() -> None:
    with pytest.raises(Problems) as error:
        check_target(MIXTRAL, Grid(tensor=3, pipeline=3, expert=5, expert_tensor=6))
    assert [problem.what.split(" cannot")[0] for problem in error.value.problems] == [
        "the attention heads",
        "the rows of the padded vocabulary",
        "the query groups",
        "the experts",
        "two expert tensor parallel ranks would share one file name",
    ]
    assert [problem.remedy for problem in error.value.problems[:4]] == [
        "choose a --tp that divides 4",
        "choose a --tp that divides 4",
        "choose a --tp that divides 4",
        "choose a --ep that divides 8",
    ]
    assert [(problem.expected, problem.found) for problem in error.value.problems] == [
        ("--tp that divides 8", "3"),
        ("--tp that divides 256", "3"),
        ("--tp that divides 4", "3"),
        ("--ep that divides 8", "5"),
        ("--etp that divides 3, the tensor parallel size", "6"),
    ]


def test_the_remedy_of_a_refused_size_is_a_size_that_is_accepted() -> None:
    model = Architecture(**(vars(LLAMA) | {"heads": 24, "query_groups": 8}))
    with pytest.raises(UsageError) as error:
        check_target(model, Grid(tensor=16))
    assert error.value.remedy == "choose a --tp that divides 8"
    for size in (1, 2, 4, 8):
        check_target(model, Grid(tensor=size))
