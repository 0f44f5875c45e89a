"""Checkpoints of Habana's own converters: the right tensors whatever those tools got wrong.

The real ones are not part of the repository: they are looked for beside the checkout, and tests skip where they are
absent.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import Grid, Model, State, hf_tensors, make, megatron_shards, save, training_args
from tests.converting import assert_same, convert, read_tensors

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures"
REAL = pytest.mark.parametrize("folder", ["habana_llama3.1_tp2pp1", "habana_mixtral_tp1pp1ep4"])

MIXTRAL = Model(layers=2, experts=4)


def real(folder: str) -> Path:
    path = FIXTURES / folder
    if not path.is_dir():
        pytest.skip(f"{folder} is absent")
    return path


@REAL
@pytest.mark.parametrize("placement", ["gather", "direct"])
def test_a_real_import_gives_back_the_model_that_was_imported_bit_for_bit(
    folder: str, placement: str, tmp_path: Path
) -> None:
    source = real(folder)
    assert convert(source / "megatron", tmp_path / "out", "--placement", placement) == 0
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "hf" / "model.safetensors"))


@REAL
def test_the_flag_for_imported_experts_changes_nothing_where_experts_are_whole(folder: str, tmp_path: Path) -> None:
    source = real(folder)
    assert convert(source / "megatron", tmp_path / "out", "--habana-imported-experts") == 0
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "hf" / "model.safetensors"))


@REAL
def test_the_config_of_a_real_import_is_right_but_for_the_rotary_base_that_the_importer_lost(
    folder: str, tmp_path: Path
) -> None:
    source = real(folder)
    assert convert(source / "megatron", tmp_path / "out", "--tokenizer", str(source / "hf")) == 0
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = json.loads((source / "hf" / "config.json").read_text())
    assert found["rope_theta"] == 10000.0  # the known defect: the args of the import say so
    assert found["rope_scaling"] is None  # and that no scaling is in use
    # What is no number of the model, what the importer lost, and what transformers fills in where it is null.
    skipped = {"rope_theta", "rope_scaling", "transformers_version", "router_aux_loss_coef", "head_dim"}
    for name, value in expected.items():
        assert name in skipped or found[name] == value, name
    assert found["head_dim"] == expected["hidden_size"] // expected["num_attention_heads"]


@REAL
def test_the_args_of_a_real_import_are_kept_as_the_tool_itself_printed_them(folder: str, tmp_path: Path) -> None:
    source = real(folder)
    assert convert(source / "megatron", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "source_megatron_args.json").read_text())
    printed = json.loads((source / "megatron" / "target_megatron_args.json").read_text())
    different = {name for name, value in printed.items() if name not in found or found[name] != value}
    assert len(printed) > 300
    assert different == set()


def imported(
    model: Model, hf: dict[str, torch.Tensor], grid: Grid, experts: str = "sequential"
) -> dict[str, list[State]]:
    """Shards whose expert fc1 is a plain chunk of gate above up, as Habana's importer cuts it."""
    shuffled = dict(hf)
    for layer in range(model.layers):
        for expert in range(model.experts):
            gate, up = (
                f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight" for name in ("w1", "w3")
            )
            chunks = torch.cat([hf[gate], hf[up]]).chunk(grid.tp)
            # `megatron_shards` gives rank r the r-th part of each of the two: make those halves of the plain chunk.
            shuffled[gate] = torch.cat([chunk.chunk(2)[0] for chunk in chunks])
            shuffled[up] = torch.cat([chunk.chunk(2)[1] for chunk in chunks])
    return megatron_shards(model, shuffled, grid, experts=experts)


def fc1(shards: dict[str, list[State]], directory: str) -> torch.Tensor:
    tensor: torch.Tensor = shards[directory][0]["decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight"]
    return tensor


def test_an_imported_shard_is_a_plain_chunk_of_gate_above_up() -> None:
    hf = hf_tensors(MIXTRAL)
    shards = imported(MIXTRAL, hf, Grid(tp=2))
    gate, up = (hf[f"model.layers.0.block_sparse_moe.experts.0.{name}.weight"] for name in ("w1", "w3"))
    assert torch.equal(fc1(shards, "mp_rank_00"), gate)
    assert torch.equal(fc1(shards, "mp_rank_01"), up)


@pytest.mark.parametrize("experts", ["sequential", "dynamic", "dynamic-transposed"])
@pytest.mark.parametrize("grid", [Grid(tp=2), Grid(tp=4), Grid(tp=2, pp=2, ep=2)], ids=str)
def test_imported_experts_are_read_in_the_order_in_which_they_were_cut(
    grid: Grid, experts: str, tmp_path: Path
) -> None:
    model = Model(layers=2, experts=4, groups=4)
    hf = hf_tensors(model)
    args = training_args(model, grid, expert_tensor_parallel_size=1, moe_permuted_weights=experts == "dynamic")
    save(tmp_path / "in", imported(model, hf, grid, experts), args)
    assert convert(tmp_path / "in", tmp_path / "out", "--habana-imported-experts") == 0
    assert_same(read_tensors(tmp_path / "out"), hf)


def test_imported_experts_are_refused_without_the_flag_and_the_flag_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = imported(MIXTRAL, hf_tensors(MIXTRAL), Grid(tp=2))
    save(tmp_path / "in", shards, training_args(MIXTRAL, Grid(tp=2), expert_tensor_parallel_size=1))
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "wrong shape for decoder.layers.0.mlp.experts.0.linear_fc1.weight\n" in err
    assert "expected: [48, 16] from the args and TP2 PP1 VPP1 EP1 ETP1\n" in err
    assert "found:    [24, 16]\n" in err
    assert "if Habana's converter imported this checkpoint, add --habana-imported-experts" in err
    assert not (tmp_path / "out").exists()


def test_the_flag_puts_the_rows_of_a_trained_checkpoint_in_a_wrong_order(tmp_path: Path) -> None:
    """Nothing in the file can tell the two kinds apart where the args give ETP = TP: hence the warning in the help.

    Each rank of a trained checkpoint holds its half of the gate above its half of the up rows. Read as plain chunks,
    w1 becomes all that rank 0 holds, and w3 all of rank 1.
    """
    expected = make(tmp_path / "in", MIXTRAL, Grid(tp=2))
    assert convert(tmp_path / "in", tmp_path / "right") == 0
    assert_same(read_tensors(tmp_path / "right"), expected)
    assert convert(tmp_path / "in", tmp_path / "wrong", "--habana-imported-experts") == 0
    found = read_tensors(tmp_path / "wrong")
    at = "model.layers.0.block_sparse_moe.experts.0."
    gate, up = expected[at + "w1.weight"].chunk(2), expected[at + "w3.weight"].chunk(2)
    assert torch.equal(found[at + "w1.weight"], torch.cat([gate[0], up[0]]))
    assert torch.equal(found[at + "w3.weight"], torch.cat([gate[1], up[1]]))
    others = {name for name in expected if not name.endswith(("w1.weight", "w3.weight"))}
    assert_same({name: found[name] for name in others}, {name: expected[name] for name in others})
