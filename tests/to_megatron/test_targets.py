"""Every target that can exist, tensor for tensor against plain reshapes; what cannot exist is refused with all reasons.

The reference shares nothing with the package; `tests/oracle` shows that Megatron-Core lays its parameters out like it.
"""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import Grid, Model, State
from tests.to_megatron import (
    EXPERTS,
    FILE,
    NORMS,
    assert_same_shards,
    expected_shards,
    make_hf,
    read_shards,
    to_megatron,
)

LLAMA = Model(layers=8, heads=8, groups=4, vocab=45)
MIXTRAL = Model(layers=2, experts=4, groups=4)

TARGETS: dict[str, tuple[Model, Grid]] = {
    "one rank": (LLAMA, Grid()),
    "TP2": (LLAMA, Grid(tp=2)),
    "TP4": (LLAMA, Grid(tp=4)),
    "PP2": (LLAMA, Grid(pp=2)),
    "TP2 PP4": (LLAMA, Grid(tp=2, pp=4)),
    "TP2 PP2 VPP2": (LLAMA, Grid(tp=2, pp=2, vpp=2)),
    "PP2 VPP4": (LLAMA, Grid(pp=2, vpp=4)),
    "as many groups as heads": (replace(LLAMA, groups=8), Grid(tp=2)),
    "one group on two ranks": (replace(LLAMA, groups=1), Grid(tp=2)),
    "two groups on eight ranks": (replace(LLAMA, groups=2), Grid(tp=8)),
    "heads wider than hidden / heads": (replace(LLAMA, head_dim=6), Grid(tp=2)),
    "fp32": (replace(LLAMA, dtype=torch.float32), Grid(tp=2, pp=2)),
    "fp16": (replace(LLAMA, dtype=torch.float16), Grid(tp=2)),
    "a vocabulary without padding": (replace(LLAMA, vocab=48), Grid(tp=4)),
    "shards of the vocabulary that are all padding": (replace(LLAMA, vocab=5), Grid(tp=4)),
    "tied, one stage": (replace(LLAMA, tied=True), Grid(tp=2)),
    "tied, two stages": (replace(LLAMA, tied=True), Grid(tp=2, pp=2)),
    "tied, virtual stages": (replace(LLAMA, tied=True), Grid(tp=2, pp=2, vpp=2)),
    "biases": (replace(LLAMA, linear_bias=True), Grid(tp=2, pp=2)),
    "experts on one rank": (MIXTRAL, Grid()),
    "experts TP2": (MIXTRAL, Grid(tp=2)),
    "experts EP2": (MIXTRAL, Grid(ep=2)),
    "experts EP4 PP2": (MIXTRAL, Grid(ep=4, pp=2)),
    "experts TP2 EP2": (MIXTRAL, Grid(tp=2, ep=2)),
    "experts TP2 PP2 EP2": (MIXTRAL, Grid(tp=2, pp=2, ep=2)),
    "experts TP2 EP4 ETP1": (MIXTRAL, Grid(tp=2, ep=4, etp=1)),
    "experts TP4 EP2 ETP2": (MIXTRAL, Grid(tp=4, ep=2, etp=2)),
    "experts TP4 EP2 ETP1": (MIXTRAL, Grid(tp=4, ep=2, etp=1)),
    "experts PP2 VPP2 EP2": (replace(MIXTRAL, layers=4), Grid(pp=2, vpp=2, ep=2)),
    "tied experts PP2": (replace(MIXTRAL, tied=True), Grid(tp=2, pp=2, ep=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_every_shard_of_a_grid_is_the_reshaped_model_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, grid = TARGETS[name]
    hf = make_hf(tmp_path / "hf", model)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", grid=grid) == 0
    assert_same_shards(read_shards(tmp_path / "megatron"), expected_shards(model, hf, grid))


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("grid", [Grid(), Grid(tp=2, ep=2), Grid(tp=2, ep=4, etp=1)], ids=str)
def test_experts_and_norms_are_spelled_as_asked_for(grid: Grid, experts: str, norms: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", MIXTRAL)
    flags = ("--saver-transformer-impl", norms, "--expert-layout", experts)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", *flags, grid=grid) == 0
    expected = expected_shards(MIXTRAL, hf, grid, norms=norms, experts=experts)
    assert_same_shards(read_shards(tmp_path / "megatron"), expected)


@pytest.mark.parametrize("norms", NORMS)
def test_norms_of_dense_layers_are_spelled_as_asked_for(norms: str, tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", LLAMA)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", "--saver-transformer-impl", norms, grid=Grid(tp=2)) == 0
    assert_same_shards(read_shards(tmp_path / "megatron"), expected_shards(LLAMA, hf, Grid(tp=2), norms=norms))


class _WithoutMegatron(pickle.Unpickler):
    """Makes an empty namespace of every object whose class is Megatron's."""

    def find_class(self, module: str, name: str) -> Any:
        return (lambda *_: Namespace()) if module.startswith("megatron.") else super().find_class(module, name)


@pytest.mark.parametrize(
    ("folder", "grid"), [("habana_llama3.1_tp2pp1", Grid(tp=2)), ("habana_mixtral_tp1pp1ep4", Grid(ep=4))]
)
def test_habana_names_and_weights_are_those_of_habanas_own_tool(folder: str, grid: Grid, tmp_path: Path) -> None:
    source = Path(__file__).parents[3] / "shared" / "fixtures" / folder
    if not source.is_dir():
        pytest.skip(f"{folder} is absent")
    pickles = Namespace(Unpickler=_WithoutMegatron, load=pickle.load, __name__="without megatron")
    expected = {}
    for directory in sorted((source / "megatron" / "iter_0000001").glob("mp_rank_*")):
        saved = torch.load(directory / FILE, weights_only=False, pickle_module=pickles)
        expected[directory.name] = [{name: t for name, t in saved["model"].items() if isinstance(t, torch.Tensor)}]
    flags = ("--saver-transformer-impl", "habana", "--make-vocab-size-divisible-by", "128")
    assert to_megatron(source / "hf", tmp_path / "megatron", *flags, grid=grid) == 0
    assert_same_shards(read_shards(tmp_path / "megatron"), expected)


@pytest.mark.parametrize("experts", ["grouped", "habana-dynamic"])
def test_square_experts_are_no_less_clear(experts: str, tmp_path: Path) -> None:
    model = Model(layers=1, hidden=16, ffn=16, groups=4, experts=2)  # fc2 is square, and fc1 of a rank of two
    hf = make_hf(tmp_path / "hf", model)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", "--expert-layout", experts, grid=Grid(tp=2)) == 0
    expected = expected_shards(model, hf, Grid(tp=2), experts=experts)
    assert_same_shards(read_shards(tmp_path / "megatron"), expected)


def in_stages(shards: dict[str, list[State]], layers: list[int]) -> dict[str, list[State]]:
    """Shards of one rank per layer, joined to stages of so many layers each."""
    joined: dict[str, list[State]] = {}
    first = 0
    for stage, count in enumerate(layers):
        chunk: State = {}
        for local, layer in enumerate(range(first, first + count)):
            for name, tensor in shards[f"mp_rank_00_{layer:03d}"][0].items():
                chunk[name.replace("decoder.layers.0.", f"decoder.layers.{local}.")] = tensor
        joined[f"mp_rank_00_{stage:03d}"] = [chunk]
        first += count
    return joined


@pytest.mark.parametrize(
    ("flags", "layers"),
    [
        ("--decoder-first-pipeline-num-layers 2", [2, 3, 3]),
        ("--decoder-last-pipeline-num-layers 2", [3, 3, 2]),
        ("--decoder-first-pipeline-num-layers 3 --decoder-last-pipeline-num-layers 1", [3, 4, 1]),
        ("--pipeline-model-parallel-layout Et|t*4|tttL", [1, 4, 3]),
        ("--pipeline-model-parallel-layout E,tt,|(tt)*2|ttL", [2, 4, 2]),
    ],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_stages_may_hold_different_numbers_of_layers(tied: bool, flags: str, layers: list[int], tmp_path: Path) -> None:
    model = replace(LLAMA, tied=tied)
    hf = make_hf(tmp_path / "hf", model)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", *flags.split(), grid=Grid(pp=3)) == 0
    expected = in_stages(expected_shards(model, hf, Grid(pp=8)), layers)
    assert_same_shards(read_shards(tmp_path / "megatron"), expected)


def test_a_layout_may_leave_first_and_last_stages_without_layers(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", LLAMA)
    layout = ("--pipeline-model-parallel-layout", "E|t*8|L")
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", *layout, grid=Grid(pp=3)) == 0
    found = read_shards(tmp_path / "megatron")
    whole = expected_shards(LLAMA, hf, Grid())["mp_rank_00"][0]
    ends = {"embedding.word_embeddings.weight": 0, "decoder.final_layernorm.weight": 2, "output_layer.weight": 2}
    stages: list[State] = [{}, {}, {}]
    for name, tensor in whole.items():
        stages[ends.get(name, 1)][name] = tensor
    assert_same_shards(found, {f"mp_rank_00_{number:03d}": [stage] for number, stage in enumerate(stages)})


def test_a_layout_says_how_many_virtual_stages_there_are(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", LLAMA)
    layout = ("--pipeline-model-parallel-layout", "Ett|tt|tt|ttL")
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", *layout, grid=Grid(pp=2)) == 0
    assert_same_shards(read_shards(tmp_path / "megatron"), expected_shards(LLAMA, hf, Grid(pp=2, vpp=2)))


def test_virtual_stages_may_be_given_by_their_layers(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", LLAMA)
    each = ("--num-layers-per-virtual-pipeline-stage", "2")
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", *each, grid=Grid(pp=2)) == 0
    assert_same_shards(read_shards(tmp_path / "megatron"), expected_shards(LLAMA, hf, Grid(pp=2, vpp=2)))


@pytest.mark.parametrize(
    ("flags", "size", "taken"),
    [
        ((), Grid(tp=2, pp=2), "tensor 2, pipeline 2"),
        (("--target-tensor-parallel-size", "1"), Grid(pp=2), "pipeline 2"),
        (("--target-expert-parallel-size", "2"), Grid(tp=2, pp=2, ep=2), "tensor 2, pipeline 2"),
    ],
)
def test_parallel_sizes_that_no_flag_gives_are_those_of_the_margs_file(
    flags: tuple[str, ...], size: Grid, taken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = make_hf(tmp_path / "hf", MIXTRAL)
    # Those of experts are of the run that saved the file, as in Habana's tool.
    of_experts = {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, **of_experts}
    (tmp_path / "margs.json").write_text(json.dumps(sizes))
    margs = ("--source-margs-file", str(tmp_path / "margs.json"))
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", *margs, *flags) == 0
    assert_same_shards(read_shards(tmp_path / "megatron"), expected_shards(MIXTRAL, hf, size))
    assert f"parallel sizes kept from margs.json, as no flag sets them: {taken}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("margs", "flags", "note"),
    [
        (
            {"virtual_pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1},
            "",
            "virtual_pipeline_model_parallel_size 2 (None here), decoder_last_pipeline_num_layers 1 (None here)",
        ),
        ({"virtual_pipeline_model_parallel_size": 2}, "--target-virtual-pipeline-parallel-size 2", ""),
        ({"virtual_pipeline_model_parallel_size": 2}, "--target-pipeline-parallel-size 2", ""),
        ({"decoder_last_pipeline_num_layers": None, "account_for_loss_in_pipeline_split": False}, "", ""),
    ],
)
def test_a_layout_of_the_margs_file_that_the_target_has_not_is_told(
    margs: dict[str, object], flags: str, note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", LLAMA)
    (tmp_path / "margs.json").write_text(json.dumps({"pipeline_model_parallel_size": 2, **margs}))
    given = ("--source-margs-file", str(tmp_path / "margs.json"), *flags.split())
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", *given) == 0
    _, found, told = capsys.readouterr().err.partition("which only flags can set: ")
    assert (bool(found), told.partition("\n")[0]) == (bool(note), note)


@pytest.mark.parametrize(
    ("named", "is_told"),
    [
        ("/models/llama", True),
        ("./llama", True),
        ("models/typo", True),  # below a directory that is here
        ("llama/tokenizer.model", True),
        ("a/b/c", True),
        ("org/name", False),
        ("gpt2", False),
        ("models", False),
    ],
)
def test_a_tokenizer_s_path_that_is_not_here_is_told_and_taken_as_it_is(
    named: str, is_told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hf(tmp_path / "hf", Model())
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert to_megatron(tmp_path / "hf", tmp_path / "out", "--tokenizer-model", named) == 0
    assert (f"warning: --tokenizer-model {named} is not on this machine" in capsys.readouterr().err) is is_told
    args = json.loads((tmp_path / "out" / "target_megatron_args.json").read_text())
    assert args["tokenizer_model"] == (str(tmp_path / "models") if named == "models" else named)


def test_a_checkpoint_inside_the_model_s_directory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", Model())
    before = sorted((tmp_path / "hf").iterdir())
    assert to_megatron(tmp_path / "hf", tmp_path / "hf" / "megatron") == 2
    assert "the target lies in its own source" in capsys.readouterr().err
    assert sorted((tmp_path / "hf").iterdir()) == before


@pytest.mark.parametrize(
    ("model", "flags", "note"),
    [
        (Model(), "--expert-layout grouped", "--expert-layout has no effect: the model has no experts"),
        (Model(), "--target-expert-tensor-parallel-size 2", "tensor-parallel-size has no effect: the model has no"),
        (MIXTRAL, "--expert-layout te-grouped --saver-transformer-impl local", "has te-grouped experts beside the"),
        (MIXTRAL, "--expert-layout habana-dynamic", "has habana-dynamic experts beside the norms of transformer"),
        (Model(), "--iteration 0", "iteration 0: Habana's Megatron and Megatron-Core up to 0.14 do not load it"),
    ],
)
def test_what_has_no_effect_or_no_reader_is_said(
    model: Model, flags: str, note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", model)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", *flags.split()) == 0
    assert capsys.readouterr().err.count(note) == 1


REFUSED: dict[str, tuple[Model, str, list[str]]] = {
    "heads": (
        Model(hidden=24, heads=6, groups=6), "--target-tensor-parallel-size 4",
        ["the attention heads", "expected: --tp that divides 6", "found:    4"],
    ),
    "ffn": (Model(ffn=22), "--target-tensor-parallel-size 4", ["the columns of the MLP", "--tp that divides 22"]),
    "groups": (
        Model(hidden=24, heads=12, groups=6), "--target-tensor-parallel-size 4",
        ["the query groups", "--tp that divides 6"],
    ),
    "less than a row of a head for each rank": (
        Model(heads=16, groups=1, head_dim=4, ffn=32), "--target-tensor-parallel-size 16",
        ["choose a --tp that divides"],
    ),
    "layers": (Model(), "--target-pipeline-parallel-size 3", ["4 layers cannot be divided over 3 pipeline ranks"]),
    "virtual stages": (
        Model(), "--target-pipeline-parallel-size 2 --target-virtual-pipeline-parallel-size 3",
        ["4 layers cannot be divided over 2 pipeline ranks with 3 virtual stages each"],
    ),
    "virtual stages of one rank": (
        Model(), "--target-virtual-pipeline-parallel-size 2", ["virtual stages need at least 2 pipeline ranks"]
    ),
    "experts": (MIXTRAL, "--target-expert-parallel-size 3", ["the experts cannot be divided", "--ep that divides 4"]),
    "expert tensor ranks": (
        MIXTRAL, "--target-tensor-parallel-size 2 --target-expert-tensor-parallel-size 4",
        ["two expert tensor parallel ranks would share one file name", "found:    4"],
    ),
    "expert ranks of a dense model": (
        Model(), "--target-expert-parallel-size 2",
        ["a model without experts cannot have expert parallel ranks", "expected: no --ep"],
    ),
    "layers of virtual stages": (
        Model(), "--target-pipeline-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
        ["4 layers cannot be divided over 2 pipeline ranks", "virtual stages of 3 need a multiple of 6 layers"],
    ),
    "virtual stages said twice": (
        Model(), "--target-virtual-pipeline-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        ["two flags say how many virtual stages there are"],
    ),
    "flags that each are wrong for another reason": (
        Model(hidden=24, heads=6, groups=6),
        "--target-tensor-parallel-size 4 --true-vocab-size 30 --model-size llama2-7B "
        "--target-pipeline-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
        ["--true-vocab-size is not the model's", "--model-size is not the model", "virtual stages of 3",
         "the attention heads"],
    ),
    "too few stages in the layout": (
        Model(), "--target-pipeline-parallel-size 4 --pipeline-model-parallel-layout Ett|ttL",
        ["the layout has 2 stages, --pp times --vpp is 4"],
    ),
    "layers in the layout": (
        Model(), "--target-pipeline-parallel-size 2 --pipeline-model-parallel-layout Ett|tttL",
        ["the layout has 5 layers (t), the model 4"],
    ),
    "all at once": (
        Model(hidden=24, heads=6, groups=6, ffn=22, layers=5),
        "--target-tensor-parallel-size 4 --target-pipeline-parallel-size 2",
        ["4 problems", "the attention heads", "the columns of the MLP", "the query groups", "5 layers cannot be"],
    ),
    "all at once, with experts": (
        replace(MIXTRAL, layers=3), "--target-tensor-parallel-size 3 --target-pipeline-parallel-size 2 "
        "--target-expert-parallel-size 3 --target-expert-tensor-parallel-size 2",
        ["the attention heads", "the experts cannot be divided", "share one file name", "3 layers cannot be"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_target_that_cannot_exist_is_refused_with_all_reasons_before_anything_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, flags, reasons = REFUSED[name]
    make_hf(tmp_path / "hf", model)
    before = sorted(tmp_path.rglob("*"))
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", *flags.split()) != 0
    message = capsys.readouterr().err
    assert [reason for reason in reasons if reason not in message] == []
    assert "internal error" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_fewer_groups_than_ranks_are_written_with_a_word_on_who_loads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", Model(groups=1))
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", grid=Grid(tp=2)) == 0
    assert "1 query groups on 2 tensor parallel ranks: only Megatron-Core 0.16 and newer" in capsys.readouterr().err
