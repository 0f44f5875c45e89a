"""Every spelling of norms and experts, at every kind of grid, gives the same Hugging Face tensors bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model, make
from tests.converting import assert_same, convert, read_tensors

EXPERT_LAYOUTS = (
    "sequential", "te-grouped", "te-single", "grouped",
    "dynamic", "dynamic-transposed", "dynamic-unfused", "dynamic-transposed-unfused",
)  # fmt: skip


@pytest.mark.parametrize("norms", ["local", "te", "habana-fused"])
@pytest.mark.parametrize("grid", [Grid(), Grid(tp=2, pp=2), Grid(pp=2, vpp=2)], ids=str)
def test_norm_spellings_give_the_same_tensors(norms: str, grid: Grid, tmp_path: Path) -> None:
    expected = make(tmp_path / "megatron", grid=grid, norms=norms)
    assert convert(tmp_path / "megatron", tmp_path / "hf") == 0
    assert_same(read_tensors(tmp_path / "hf"), expected)


@pytest.mark.parametrize("experts", EXPERT_LAYOUTS)
@pytest.mark.parametrize(
    "grid", [Grid(), Grid(tp=2, ep=2), Grid(tp=2, pp=2, ep=4, etp=1), Grid(tp=4, ep=2, etp=2)], ids=str
)
def test_expert_layouts_give_the_same_tensors(experts: str, grid: Grid, tmp_path: Path) -> None:
    permuted = "transposed" not in experts
    model = Model(experts=4, heads=4, groups=4)
    expected = make(tmp_path / "megatron", model, grid, experts=experts, moe_permuted_weights=permuted)
    assert convert(tmp_path / "megatron", tmp_path / "hf") == 0
    assert_same(read_tensors(tmp_path / "hf"), expected)


@pytest.mark.parametrize("ffn", [8, 16], ids=["fc1 is square", "fc2 is square"])
@pytest.mark.parametrize("experts", ["dynamic", "dynamic-transposed"])
def test_the_other_matrix_tells_how_square_dynamic_experts_are_stored(ffn: int, experts: str, tmp_path: Path) -> None:
    model = Model(hidden=16, ffn=ffn, experts=2)
    wrong_flag = "transposed" in experts
    expected = make(tmp_path / "megatron", model, experts=experts, moe_permuted_weights=wrong_flag)
    assert convert(tmp_path / "megatron", tmp_path / "hf") == 0
    assert_same(read_tensors(tmp_path / "hf"), expected)


@pytest.mark.parametrize("experts", ["dynamic-unfused", "dynamic-transposed-unfused"])
def test_the_flag_tells_where_both_matrices_are_square(experts: str, tmp_path: Path) -> None:
    permuted = "transposed" not in experts
    expected = make(tmp_path / "megatron", Model(ffn=16, experts=2), experts=experts, moe_permuted_weights=permuted)
    assert convert(tmp_path / "megatron", tmp_path / "hf") == 0
    assert_same(read_tensors(tmp_path / "hf"), expected)
