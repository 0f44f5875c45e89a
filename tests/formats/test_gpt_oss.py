"""gpt-oss' experts: transposed, all of a layer in one tensor, the columns of gate and up in turn.

Witness: the published formula for them, in torch, on what torch and safetensors read.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_convert.__main__ import main
from dist_convert.errors import PlanError
from dist_convert.records import View, Window, in_turn

EXPERTS = "model.layers.0.mlp.experts"
HIDDEN, FFN = 16, 49
CONFIG = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "vocab_size": 128, "hidden_size": HIDDEN,
    "intermediate_size": FFN, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, "max_position_embeddings": 64,
    "layer_types": ["sliding_attention"],
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False},
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (128, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (128, HIDDEN),
    "model.layers.0.input_layernorm.weight": (HIDDEN,), "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
    "model.layers.0.self_attn.q_proj.weight": (16, HIDDEN), "model.layers.0.self_attn.q_proj.bias": (16,),
    "model.layers.0.self_attn.k_proj.weight": (8, HIDDEN), "model.layers.0.self_attn.k_proj.bias": (8,),
    "model.layers.0.self_attn.v_proj.weight": (8, HIDDEN), "model.layers.0.self_attn.v_proj.bias": (8,),
    "model.layers.0.self_attn.o_proj.weight": (HIDDEN, 16), "model.layers.0.self_attn.o_proj.bias": (HIDDEN,),
    "model.layers.0.self_attn.sinks": (4,), "model.layers.0.mlp.router.weight": (4, HIDDEN),
    "model.layers.0.mlp.router.bias": (4,), f"{EXPERTS}.gate_up_proj": (4, HIDDEN, 2 * FFN),
    f"{EXPERTS}.gate_up_proj_bias": (4, 2 * FFN), f"{EXPERTS}.down_proj": (4, FFN, HIDDEN),
    f"{EXPERTS}.down_proj_bias": (4, HIDDEN),
}  # fmt: skip


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A directory whose every element is another number."""
    directory, number = tmp_path / "published", 0
    tensors = {}
    for name, shape in SHAPES.items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(number, number + count, dtype=torch.float32).reshape(shape)
        number += count
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def convert(source: Path, target: Path, to: str, *more: str) -> Path:
    """The directory of what was converted, in blocks that hold a few rows."""
    assert main(["convert", str(source), str(target), "--to", to, "--device", "cpu", *more]) == 0
    return target


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # 4 KiB are 32 rows of 16 columns of gate and of up; of 49 rows the last block has 17.
    monkeypatch.setattr("dist_convert.plan.copies.BLOCK_BYTES", 4096)


def test_gate_lies_above_up_in_megatron(published: Path, tmp_path: Path) -> None:
    root = convert(published, tmp_path / "megatron", "torch", "--make-vocab-size-divisible-by", "1")
    [file] = root.glob("*/mp_rank_00/model_optim_rng.pt")
    found, stored = torch.load(file, weights_only=False)["model"], load_file(published / "model.safetensors")
    for expert in range(4):
        linear = f"decoder.layers.0.mlp.experts.local_experts.{expert}.linear_fc"
        both, bias = stored[f"{EXPERTS}.gate_up_proj"][expert].T, stored[f"{EXPERTS}.gate_up_proj_bias"][expert]
        assert torch.equal(found[f"{linear}1.weight"], torch.cat([both[::2], both[1::2]]))
        assert torch.equal(found[f"{linear}1.bias"], torch.cat([bias[::2], bias[1::2]]))
        assert torch.equal(found[f"{linear}2.weight"], stored[f"{EXPERTS}.down_proj"][expert].T)
        assert torch.equal(found[f"{linear}2.bias"], stored[f"{EXPERTS}.down_proj_bias"][expert])


@pytest.mark.parametrize("way", ["back", "copy"])
@pytest.mark.parametrize("block_bytes", [4096, 128])  # 128 bytes are one row: its elements are written one by one
def test_files_get_their_columns_in_turn(
    published: Path, tmp_path: Path, way: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_convert.plan.copies.BLOCK_BYTES", block_bytes)
    source = published if way == "copy" else convert(published, tmp_path / "megatron", "torch")
    target = convert(source, tmp_path / "again", "huggingface", "--target-params-dtype", "keep")
    expected, found = (load_file(path / "model.safetensors") for path in (published, target))
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_experts_with_biases_are_not_cut_over_tensor_parallel_ranks(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--target-tensor-parallel-size", "2", "--target-expert-tensor-parallel-size", "2"]
    assert main(["convert", str(published), str(tmp_path / "megatron"), "--to", "torch", *flags]) != 0
    assert "Megatron does not cut experts that have biases" in capsys.readouterr().err


def test_a_layout_without_a_place_for_biases_is_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(published), str(tmp_path / "megatron"), "--to", "torch", "--expert-layout", "grouped"]
    assert main(command) != 0
    assert "no place for their biases" in capsys.readouterr().err


GATE = View("file", "gate_up", "BF16", 1000, 3, 5, 2, 6)
UP = View("file", "gate_up", "BF16", 1002, 3, 5, 2, 6)


def test_views_in_turn_are_one_without_gaps() -> None:
    assert in_turn([GATE, UP]) == View("file", "gate_up", "BF16", 1000, 6, 5, 1, 6)


@pytest.mark.parametrize(
    "views", [[GATE], [UP, GATE], [GATE, GATE], [GATE, View("file", "gate_up", "BF16", 1004, 3, 5, 2, 6)]], ids=len
)
def test_other_views_are_not_in_turn(views: list[View]) -> None:
    assert in_turn(views) is None


def test_bytes_between_elements_are_never_part_of_a_window() -> None:
    with pytest.raises(PlanError):
        Window.of(GATE)
