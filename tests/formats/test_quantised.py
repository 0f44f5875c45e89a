"""Quantised Hugging Face models are converted as what their publisher's dequantisation makes of them, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import dist_convert
from dist_convert.__main__ import main
from dist_convert.errors import ConversionError, MissingShard, Problems, UnsupportedModel
from dist_convert.formats.huggingface.files import catalog_of_files, lay_out_files, target_tensors
from dist_convert.formats.huggingface.open import open_huggingface
from dist_convert.formats.huggingface.quantised import Quantisation, quantisation_of, with_scales
from dist_convert.plan.content import plan_content
from dist_convert.ranks.collectives import alone
from dist_convert.records import StoredTensor
from tests.converting import assert_same, read_tensors
from tests.quantised import BLOCK, Tensors, change_config, change_tensors, make_fp8, make_mxfp4, quantised, values

DOWN = "model.layers.1.mlp.down_proj.weight"
GRIDS = {"torch": ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"), "torch_dist": ()}


def run(source: Path, target: Path, to: str, *flags: str) -> int:
    return main(["convert", str(source), str(target), "--to", to, "--device", "cpu", *flags])


def config(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def refusal(directory: Path) -> ConversionError:
    """What is wrong with a model; the first of several things."""
    with pytest.raises(ConversionError) as error:
        open_huggingface(directory, alone()).catalog()
    return error.value.problems[0] if isinstance(error.value, Problems) else error.value


def test_what_is_written_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    meant = make_fp8(tmp_path / "fp8")
    assert run(tmp_path / "fp8", tmp_path / "bf16", "huggingface", "--verify") == 0
    assert_same(read_tensors(tmp_path / "bf16"), meant)
    by = FineGrainedFP8Config(dequantize=True, weight_block_size=BLOCK)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", quantization_config=by, dtype=torch.bfloat16)
    assert_same(read_tensors(tmp_path / "bf16"), dict(model.state_dict()))
    assert "quantization_config" not in config(tmp_path / "bf16")
    assert config(tmp_path / "bf16")["dtype"] == "bfloat16"


@pytest.mark.parametrize("to", GRIDS)
def test_blocks_with_ragged_edges_go_to_megatron_and_back(to: str, tmp_path: Path) -> None:
    meant = make_fp8(tmp_path / "fp8", "deepseek-v3", torch.float8_e8m0fnu)
    assert run(tmp_path / "fp8", tmp_path / "megatron", to, "--verify", *GRIDS[to]) == 0
    assert run(tmp_path / "megatron", tmp_path / "back", "huggingface", "--like", str(tmp_path / "fp8")) == 0
    assert_same(read_tensors(tmp_path / "back"), meant)
    assert main(["verify", str(tmp_path / "fp8"), str(tmp_path / "megatron")]) == 0


def test_experts_in_four_bits_are_written_as_transformers_has_them_in_bf16(tmp_path: Path) -> None:
    meant = make_mxfp4(tmp_path / "mxfp4")
    assert run(tmp_path / "mxfp4", tmp_path / "bf16", "huggingface", "--verify") == 0
    assert_same(read_tensors(tmp_path / "bf16"), meant)
    assert "quantization_config" not in config(tmp_path / "bf16")


@pytest.mark.parametrize("to", GRIDS)
def test_experts_in_four_bits_go_to_megatron_and_back(to: str, tmp_path: Path) -> None:
    meant = make_mxfp4(tmp_path / "mxfp4")
    grid = (*GRIDS[to], "--target-expert-tensor-parallel-size", "1") if GRIDS[to] else ()
    assert run(tmp_path / "mxfp4", tmp_path / "megatron", to, "--verify", *grid) == 0
    assert run(tmp_path / "megatron", tmp_path / "back", "huggingface", "--like", str(tmp_path / "mxfp4")) == 0
    assert_same(read_tensors(tmp_path / "back"), meant)


def test_experts_in_four_bits_are_decoded_when_they_are_read_from_python(tmp_path: Path) -> None:
    meant = make_mxfp4(tmp_path / "mxfp4")
    at = "model.layers.1.mlp.experts"
    with dist_convert.open(tmp_path / "mxfp4") as model:
        up = model.get_tensor(f"{at}.3.up_proj.weight")
        down = model.get_slice(f"{at}.7.down_proj.weight")[5:60, 31:90]
    assert torch.equal(up, meant[f"{at}.gate_up_proj"][3].T[1::2])
    assert torch.equal(down, meant[f"{at}.down_proj"][7].T[5:60, 31:90])


def test_scales_of_four_bits_that_are_missing_are_an_error(tmp_path: Path) -> None:
    make_mxfp4(tmp_path / "mxfp4")
    name = "model.layers.1.mlp.experts.down_proj"
    change_tensors(tmp_path / "mxfp4", {f"{name}_scales": None})
    error = refusal(tmp_path / "mxfp4")
    assert (error.tensor, error.found) == (f"{name}_scales", "nothing in any weights file")
    assert error.expected.startswith("shape [8, 64, 3] in F32")


def test_experts_in_eight_bits_whose_rows_take_turns_are_refused(tmp_path: Path) -> None:
    meant = make_mxfp4(tmp_path / "fp8")
    change_config(tmp_path / "fp8", quantization_config={"quant_method": "fp8", "weight_block_size": BLOCK})
    stored: dict[str, torch.Tensor | None] = dict.fromkeys(read_tensors(tmp_path / "fp8"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    codes, scales = zip(*map(quantised, meant[name]), strict=True)
    both = {name: torch.stack(codes), f"{name}_scale_inv": torch.stack(scales)}
    change_tensors(tmp_path / "fp8", stored | meant | both)
    error = refusal(tmp_path / "fp8")
    assert (error.what, error.tensor, error.found) == ("a weight of an unexpected dtype", name, "F8_E4M3")


def test_what_a_target_in_float32_gets_was_never_rounded(tmp_path: Path) -> None:
    make_fp8(tmp_path / "fp8")
    assert run(tmp_path / "fp8", tmp_path / "fp32", "huggingface", "--target-params-dtype", "fp32", "--verify") == 0
    stored = read_tensors(tmp_path / "fp8")
    found = read_tensors(tmp_path / "fp32")[DOWN]
    assert torch.equal(found, values(stored[DOWN], stored[f"{DOWN}_scale_inv"]))


def test_tensors_are_decoded_when_they_are_read_from_python(tmp_path: Path) -> None:
    meant = make_fp8(tmp_path / "fp8")
    with dist_convert.open(tmp_path / "fp8") as model:
        assert "quantization_config" not in model.config
        assert_same(dict(model.tensors()), meant)
        assert torch.equal(model.get_tensor(DOWN), meant[DOWN])
        assert torch.equal(model.get_slice(DOWN)[3:60:7, 31:90], meant[DOWN][3:60:7, 31:90])


def test_a_difference_of_one_code_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_fp8(tmp_path / "fp8")
    assert run(tmp_path / "fp8", tmp_path / "bf16", "huggingface") == 0
    codes = read_tensors(tmp_path / "fp8")[DOWN]
    codes.view(torch.uint8)[50, 140] ^= 1
    change_tensors(tmp_path / "fp8", {DOWN: codes})
    assert main(["verify", str(tmp_path / "fp8"), str(tmp_path / "bf16")]) == 1
    assert "1 element, first at [50, 140]" in capsys.readouterr().out


def test_one_scale_for_a_whole_matrix_is_taken_where_the_config_says_so(tmp_path: Path) -> None:
    meant = make_fp8(tmp_path / "fp8", weight_block_size=None)
    changes: dict[str, torch.Tensor | None] = {}
    for number, name in enumerate(name for name in meant if name.endswith("_proj.weight")):
        changes[name], scales = quantised(meant[name], (1000, 1000))
        changes[f"{name}_scale_inv"] = scales.view(()) if number % 2 else scales.view(1)
        meant[name] = values(changes[name], scales, (1000, 1000)).bfloat16()
    change_tensors(tmp_path / "fp8", changes)
    with dist_convert.open(tmp_path / "fp8") as model:
        assert_same(dict(model.tensors()), meant)


def test_fused_experts_have_fused_scales(tmp_path: Path) -> None:
    block = 40, 32  # 96 rows of gate and up, and 64 of down, are no whole number of them
    meant = make_fp8(tmp_path / "fp8", "qwen3-moe", block=block)
    stored = read_tensors(tmp_path / "fp8")
    changes: dict[str, torch.Tensor | None] = dict.fromkeys(name for name in stored if ".experts." in name)
    for layer in range(4):
        at = f"model.layers.{layer}.mlp.experts"
        for fused, parts in {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.items():
            whole = [torch.cat([meant[f"{at}.{n}.{part}.weight"] for part in parts]) for n in range(8)]
            codes, scales = zip(*(quantised(one, block) for one in whole), strict=True)
            changes[f"{at}.{fused}"], changes[f"{at}.{fused}_scale_inv"] = torch.stack(codes), torch.stack(scales)
            for expert, pair in enumerate(zip(codes, scales, strict=True)):
                for part, rows in zip(parts, values(*pair, block).bfloat16().chunk(len(parts)), strict=True):
                    meant[f"{at}.{expert}.{part}.weight"] = rows
    change_tensors(tmp_path / "fp8", changes)
    with dist_convert.open(tmp_path / "fp8") as model:
        assert_same(dict(model.tensors()), meant)


def test_a_config_that_still_speaks_of_quantisation_does_not_matter_to_decoded_weights(tmp_path: Path) -> None:
    meant = make_fp8(tmp_path / "fp8")
    scales = {name: None for name in read_tensors(tmp_path / "fp8") if name.endswith("_scale_inv")}
    change_tensors(tmp_path / "fp8", {**meant, **scales})
    with dist_convert.open(tmp_path / "fp8") as model:
        assert_same(dict(model.tensors()), meant)


def test_scales_of_activations_are_left_behind_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meant = make_fp8(tmp_path / "fp8", activation_scheme="static")
    change_tensors(tmp_path / "fp8", {DOWN.replace("weight", "activation_scale"): torch.ones(1)})
    assert run(tmp_path / "fp8", tmp_path / "bf16", "huggingface") == 0
    assert_same(read_tensors(tmp_path / "bf16"), meant)
    said = capsys.readouterr().err
    assert "not converted: 1 x activation_scale (of inference in FP8), 4 B" in said
    assert "weights are stored as FP8 in blocks of 32 x 32 and decoded to bf16" in said


@pytest.mark.parametrize(("make", "method"), [(make_fp8, "fp8"), (make_mxfp4, "mxfp4")])
def test_inspect_says_it_and_counts_no_scales(
    make: Callable[[Path], Tensors], method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meant = make(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quantised_by"] == method
    assert found["parameters"] == sum(tensor.numel() for tensor in meant.values())
    assert "not_convertible" not in found


WRONG: dict[str, tuple[torch.Tensor | None, str]] = {
    "missing": (None, "nothing in any weights file"),
    "of another shape": (torch.ones(2, 4), "shape [2, 4] in F32"),
    "one for all": (torch.ones(1), "shape [1] in F32"),
    "integers": (torch.ones(2, 5, dtype=torch.int32), "shape [2, 5] in I32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_scales_that_are_not_one_for_each_block_are_an_error_with_their_name(case: str, tmp_path: Path) -> None:
    scales, found = WRONG[case]
    make_fp8(tmp_path / "fp8")
    change_tensors(tmp_path / "fp8", {f"{DOWN}_scale_inv": scales})
    error = refusal(tmp_path / "fp8")
    assert error.what == "a quantised weight without one scale for each block"
    assert (error.tensor, error.file, error.found) == (
        f"{DOWN}_scale_inv",
        str(tmp_path / "fp8/model.safetensors"),
        found,
    )
    assert error.expected.startswith("shape [2, 5] in F32, BF16, F16, F8_E8M0, U8: ")


@pytest.mark.parametrize("name", [DOWN, "model.layers.1.input_layernorm.weight"])
def test_scales_of_a_weight_that_is_not_quantised_are_an_error(name: str, tmp_path: Path) -> None:
    meant = make_fp8(tmp_path / "fp8")
    change_tensors(tmp_path / "fp8", {name: meant[name], f"{name}_scale_inv": torch.ones(2, 5)})
    error = refusal(tmp_path / "fp8")
    assert (error.tensor, error.found) == (f"{name}_scale_inv", "quantisation, shape [2, 5]")


def test_a_norm_in_eight_bits_is_an_error(tmp_path: Path) -> None:
    make_fp8(tmp_path / "fp8")
    change_tensors(tmp_path / "fp8", {"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)})
    error = refusal(tmp_path / "fp8")
    assert (error.what, error.tensor) == ("a weight of an unexpected dtype", "model.norm.weight")


def test_eight_bits_of_which_the_config_says_nothing_are_an_error(tmp_path: Path) -> None:
    make_fp8(tmp_path / "fp8")
    change_config(tmp_path / "fp8", quantization_config=None)
    assert refusal(tmp_path / "fp8").what == "a weight of an unexpected dtype"


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": "128"}, "fp8"),
        ([1], "None"),
    ],
    ids=str,
)
def test_another_scheme_is_refused_by_its_name(said: Any, name: str) -> None:
    with pytest.raises(UnsupportedModel) as error:
        quantisation_of({"quantization_config": said})
    assert error.value.what == f"weights quantised by {name} are not decoded"
    assert (error.value.file, error.value.found) == ("config.json", str(said))


def test_blocks_are_those_of_the_config_or_of_128(tmp_path: Path) -> None:
    method = {"quant_method": "fp8"}
    assert str(quantisation_of({"quantization_config": method})) == "FP8 in blocks of 128 x 128"
    assert (
        str(quantisation_of({"quantization_config": method | {"weight_block_size": None}})) == "FP8 in whole matrices"
    )
    assert quantisation_of({"quantization_config": {}}) is None


def test_who_sees_a_weight_must_see_its_scales() -> None:
    stored = {
        "w": StoredTensor("w", "a.safetensors", "F8_E4M3", (8, 8), (8, 1), 0),
        "w_scale_inv": StoredTensor("w_scale_inv", "b.safetensors", "F32", (1, 1), (1, 1), 0),
    }
    both, quantisation = frozenset({"a.safetensors", "b.safetensors"}), Quantisation("fp8", 128, 128)
    assert list(with_scales(stored, quantisation, [both, frozenset({"b.safetensors"})])) == ["w"]
    with pytest.raises(MissingShard) as error:
        with_scales(stored, quantisation, [both, frozenset({"a.safetensors"})])
    assert (error.value.tensor, error.value.file) == ("w_scale_inv", "b.safetensors")
    assert error.value.found == "rank 1 does not see it"
    assert error.value.remedy.startswith("copy b.safetensors to every node that has a.safetensors")


@pytest.mark.parametrize(
    "change",
    [{"block_rows": 64}, {"first": {"offset_bytes": 8}}, {"first": {"dtype": "BF16"}}, {"first": {"tensor": "s"}}],
)
def test_the_plan_names_how_weights_are_decoded(change: dict[str, Any], tmp_path: Path) -> None:
    make_fp8(tmp_path / "fp8")
    source, _ = open_huggingface(tmp_path / "fp8", alone()).catalog()
    [view] = source.views[DOWN]
    assert view.scales
    first = replace(view.scales.first, **change.get("first", {}))
    changed = replace(view, scales=replace(view.scales, **change | {"first": first}))
    other = replace(source, views={**source.views, DOWN: (changed,)})
    files = lay_out_files(target_tensors(source, None), 10**9)
    target = catalog_of_files(source.architecture, files)
    assert plan_content(source, target, files).digest != plan_content(other, target, files).digest
