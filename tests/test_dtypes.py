"""Target dtypes: torch's own casts bit for bit, mixed dtypes kept and listed, overflow an error, gamma - 1 undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.checkpoints import Grid, Model, State, hf_tensors, make, megatron_shards, save, training_args
from tests.converting import assert_same, convert, read_tensors

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
FC2 = "decoder.layers.0.mlp.linear_fc2.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
ROUTERS = [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)]


def awkward_values(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bit pattern at random; every other one is special: NaN of several kinds, infinities, denormals, extremes."""
    info, integer = torch.finfo(dtype), INTEGERS[dtype]
    count, width = torch.Size(shape).numel(), info.bits
    random = torch.Generator().manual_seed(count)
    patterns = torch.randint(-(1 << (width - 1)), 1 << (width - 1), (count,), generator=random).to(integer)
    infinity = torch.tensor(float("inf"), dtype=dtype).view(integer)
    numbers = [float("inf"), info.max, info.tiny, info.smallest_normal / 2, 0.0, 1 + info.eps, 65504, 65520, 2.0**-25]
    special = torch.tensor([*numbers, *(-number for number in numbers), float("nan")], dtype=dtype).view(integer)
    special = torch.cat([special, infinity.view(1) + 1, infinity.view(1) + (1 << (width - 10)), torch.tensor([1, 3])])
    patterns[::2] = special.to(integer).repeat(count)[: patterns[::2].numel()]
    return patterns.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(INTEGERS[tensor.dtype])


@pytest.mark.parametrize("wanted", ["fp16", "bf16", "fp32", "keep"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("grid", [Grid(), Grid(tp=2)], ids=str)
def test_every_value_is_cast_as_torch_casts_the_whole_tensor(
    grid: Grid, stored: torch.dtype, wanted: str, tmp_path: Path
) -> None:
    model = Model(layers=1, dtype=stored)
    hf = {name: awkward_values(stored, tuple(tensor.shape)) for name, tensor in hf_tensors(model).items()}
    save(tmp_path / "in", megatron_shards(model, hf, grid), training_args(model, grid))
    assert convert(tmp_path / "in", tmp_path / "out", "--target-params-dtype", wanted, "--allow-overflow") == 0
    found = read_tensors(tmp_path / "out")
    for name, tensor in hf.items():
        expected = tensor.to(DTYPES.get(wanted, stored))
        assert found[name].dtype == expected.dtype
        assert torch.equal(bits(found[name]), bits(expected)), name


def test_bf16_is_the_default(tmp_path: Path) -> None:
    from dist_convert.__main__ import main

    expected = make(tmp_path / "in", Model(layers=1, dtype=torch.float32))
    paths = ["--load-path", str(tmp_path / "in"), "--save-path", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["megatron-to-hf", *paths]) == 0
    assert_same(read_tensors(tmp_path / "out"), {name: tensor.bfloat16() for name, tensor in expected.items()})


def with_fp32_routers(tmp_path: Path, model: Model, grid: Grid) -> dict[str, torch.Tensor]:
    hf = hf_tensors(model) | {name: torch.randn(model.experts, model.hidden) / 3 for name in ROUTERS}
    save(tmp_path / "in", megatron_shards(model, hf, grid), training_args(model, grid))
    return hf


@pytest.mark.parametrize("wanted", ["fp16", "bf16", "keep"])
def test_a_router_in_another_dtype_than_the_rest_keeps_its_own(wanted: str, tmp_path: Path) -> None:
    model, grid = Model(layers=2, experts=4), Grid(tp=2, ep=2)
    hf = with_fp32_routers(tmp_path, model, grid)
    assert convert(tmp_path / "in", tmp_path / "out", "--target-params-dtype", wanted) == 0
    rest = DTYPES.get(wanted, torch.bfloat16)
    assert_same(read_tensors(tmp_path / "out"), {name: t if name in ROUTERS else t.to(rest) for name, t in hf.items()})


def test_what_keeps_its_dtype_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_fp32_routers(tmp_path, Model(layers=2, experts=4), Grid(tp=2, ep=2))
    assert convert(tmp_path / "in", tmp_path / "out", "--target-params-dtype", "fp16") == 0
    assert (f"2 tensors kept in a dtype other than BF16: {', '.join(ROUTERS)}\n") in capsys.readouterr().err


def test_a_file_of_mixed_dtypes_has_its_tensors_aligned_and_in_order(tmp_path: Path) -> None:
    model = Model(layers=2, experts=2)
    hf = with_fp32_routers(tmp_path, model, Grid())
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        in_file = list(opened.offset_keys())
    assert in_file[:2] == ROUTERS
    assert in_file[2:] == [name for name in hf if name not in ROUTERS]


def test_finite_values_that_become_infinite_are_refused_in_the_first_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overflowing(tmp_path)
    assert convert(tmp_path / "in", tmp_path / "out", "--target-params-dtype", "fp16") == 1
    err = capsys.readouterr().err
    assert "finite values become infinite in fp16\n" in err
    assert "found:    3 such values; the rest was not checked\n" in err
    assert f"tensor:   {FC2}\n" in err
    assert "--allow-overflow" in err
    assert "wider range" in err
    assert not (tmp_path / "out").exists()


def overflowing(tmp_path: Path) -> dict[str, torch.Tensor]:
    """65504 is fp16's largest value; 65519.99 still rounds to it, 65520 does not. Infinities do not overflow."""
    model = Model(layers=1, dtype=torch.float32)
    hf = hf_tensors(model)
    hf[DOWN][0, :8] = torch.tensor([65504, 65519.99, 65520, -70000, 1e30, float("inf"), float("-inf"), float("nan")])
    save(tmp_path / "in", megatron_shards(model, hf, Grid(tp=2)), training_args(model, Grid(tp=2)))
    return hf


def test_overflow_can_be_accepted_and_is_still_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = overflowing(tmp_path)
    assert convert(tmp_path / "in", tmp_path / "out", "--target-params-dtype", "fp16", "--allow-overflow") == 0
    assert f"3 values became infinite in {FC2}" in capsys.readouterr().err
    found = read_tensors(tmp_path / "out")[DOWN]
    assert torch.equal(bits(found), bits(hf[DOWN].half()))
    assert found[0, :5].tolist() == [65504, 65504, float("inf"), float("-inf"), float("inf")]


def test_values_that_fit_need_no_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", Model(layers=1))
    assert convert(tmp_path / "in", tmp_path / "out", "--target-params-dtype", "fp16") == 0
    assert "infinite" not in capsys.readouterr().err


def norms_minus_one(tmp_path: Path, model: Model, norms: str, **args: Any) -> dict[str, torch.Tensor]:
    """A checkpoint with gammas 0.75, 1.0 and 1.25, stored less 1; returns the right tensors."""
    gamma = torch.tensor([0.75, 1.0, 1.25, 1.5]).repeat(4).to(model.dtype)
    hf = {name: gamma if tensor.dim() == 1 else tensor for name, tensor in hf_tensors(model).items()}
    stored = {name: tensor - 1 if tensor.dim() == 1 else tensor for name, tensor in hf.items()}
    shards = megatron_shards(model, stored, Grid(tp=2), norms=norms)
    save(tmp_path / "in", shards, training_args(model, Grid(tp=2), apply_layernorm_1p=True, **args))
    return hf


@pytest.mark.parametrize("model", [Model(layers=2), Model(layers=2, experts=2)], ids=["llama", "mixtral"])
def test_norms_of_transformer_engine_stored_as_gamma_less_1_get_their_1_back(model: Model, tmp_path: Path) -> None:
    expected = norms_minus_one(tmp_path, model, "te")
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert_same(read_tensors(tmp_path / "out"), expected)


def test_a_gamma_that_the_target_dtype_cannot_hold_is_rounded_once_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(layers=1)
    hf = hf_tensors(model)
    stored = {name: torch.full_like(t, 2.0**-12) if t.dim() == 1 else t for name, t in hf.items()}
    shards = megatron_shards(model, stored, norms="te")
    save(tmp_path / "in", shards, training_args(model, apply_layernorm_1p=True))
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert "adding 1 was rounded in 48 values of norms" in capsys.readouterr().err
    assert set(read_tensors(tmp_path / "out")["model.norm.weight"].tolist()) == {1.0}
    assert convert(tmp_path / "in", tmp_path / "exact", "--target-params-dtype", "fp32") == 0
    assert set(read_tensors(tmp_path / "exact")["model.norm.weight"].tolist()) == {1 + 2.0**-12}
    assert "rounded" not in capsys.readouterr().err


def test_norms_of_habana_ignore_the_argument_and_are_gamma_itself(tmp_path: Path) -> None:
    expected = make(tmp_path / "in", Model(layers=2), apply_layernorm_1p=True, use_fused_rmsnorm=True)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert_same(read_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("norms", "args"),
    [("te", {"use_fused_rmsnorm": True}), ("local", {})],
    ids=["Transformer Engine's norms in a run of Habana's", "norms that refuse the argument"],
)
def test_norms_of_which_nobody_can_tell_how_they_are_stored_are_refused(
    norms: str, args: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", Model(layers=2), norms=norms, apply_layernorm_1p=True, **args)
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    assert "gamma - 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_quantised_weight_is_refused_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(layers=1)
    shards = megatron_shards(model, hf_tensors(model))
    shards["mp_rank_00"][0][FC2] = shards["mp_rank_00"][0][FC2].to(torch.float8_e4m3fn)
    save(tmp_path / "in", shards, training_args(model))
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert f"tensor:   {FC2}" in err
    assert "F8_E4M3" in err
