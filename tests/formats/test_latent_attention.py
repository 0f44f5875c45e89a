"""DeepSeek-V3 and Kimi K2 to Megatron and back: what training must be told, and the other `model_type` of the class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dist_convert.__main__ import main
from tests.converting import assert_same, read_tensors
from tests.oracle.families.huggingface import build
from tests.oracle.families.models import MODELS
from tests.quantised import change_config, make_fp8

DEEPSEEK_V3 = next(model for model in MODELS if model.name == "deepseek-v3")
#: Of Megatron's arguments, those that --use-checkpoint-args leaves at their defaults.
FLAGS = [
    "--kv-lora-rank 32", "--moe-router-group-topk 2", "--moe-router-num-groups 4", "--multi-latent-attention",
    "--norm-epsilon 1e-06", "--q-lora-rank 24", "--qk-head-dim 16", "--qk-layernorm", "--qk-pos-emb-head-dim 8",
    "--rope-type rope", "--v-head-dim 16",
]  # fmt: skip


def run(source: Path, target: Path, to: str, *flags: str) -> int:
    return main(["convert", str(source), str(target), "--to", to, "--device", "cpu", *flags])


def test_the_flags_that_training_needs_are_printed_and_kept_beside_the_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(DEEPSEEK_V3).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    assert run(tmp_path / "hf", tmp_path / "megatron", "torch") == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert f"training needs these flags, which --use-checkpoint-args does not restore: {' '.join(FLAGS)}" in said
    [beside] = (tmp_path / "megatron").rglob("target_megatron_args.json")
    assert json.loads(beside.read_text())["training_flags"] == FLAGS


@pytest.mark.parametrize("stored", ["bf16", "fp8"])
def test_a_kimi_k2_goes_to_megatron_and_back(stored: str, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    if stored == "fp8":
        meant = make_fp8(source, "deepseek-v3")
    else:
        build(DEEPSEEK_V3).to(torch.bfloat16).save_pretrained(source)
        saved = read_tensors(source).items()
        meant = {name: value.float() if name.endswith("e_score_correction_bias") else value for name, value in saved}
    change_config(source, model_type="kimi_k2")
    assert run(source, tmp_path / "megatron", "torch", "--target-tensor-parallel-size", "2") == 0
    assert run(tmp_path / "megatron", tmp_path / "back", "huggingface", "--like", str(source)) == 0
    assert_same(read_tensors(tmp_path / "back"), meant)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "kimi_k2"
