"""capacity_bins.pt: Habana's statistics by name, global layer, pipeline, expert and tensor rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import Grid, Model, hf_tensors, megatron_shards, save, training_args
from tests.converting import assert_same, convert, read_tensors

MOE = Model(layers=8, experts=4, groups=4)
NAMES = ("capacity_bins", "bins_usage", "total_requested_capacity")


def value_of(name: str, layer: int, pipeline: int, expert: int, tensor: int) -> torch.Tensor:
    """Numbers that occur once in the checkpoint; exact as int64 only."""
    number = (1 << 53) + 1 + 10000 * layer + 1000 * pipeline + 100 * expert + 10 * tensor + NAMES.index(name)
    return torch.tensor([number] if name == NAMES[2] else [number, -number, 0])


def place_of(directory: str, grid: Grid) -> tuple[int, int, int]:
    """Pipeline, expert and tensor rank in a directory's name."""
    numbers = [int(number) for number in directory.split("_")[2:]]
    pipeline = numbers[1] if grid.pp > 1 else 0
    return pipeline, numbers[-1] if grid.ep > 1 else 0, numbers[0]


def save_with_bins(root: Path, grid: Grid, dtype: torch.dtype = torch.int64) -> dict[str, torch.Tensor]:
    hf = hf_tensors(MOE)
    shards = megatron_shards(MOE, hf, grid)
    per_chunk = MOE.layers // (grid.pp * grid.vpp)
    for directory, chunks in shards.items():
        pipeline, expert, tensor = place_of(directory, grid)
        for virtual, chunk in enumerate(chunks):
            for local in range(per_chunk):
                layer = (virtual * grid.pp + pipeline) * per_chunk + local
                for name in NAMES:
                    key = f"decoder.layers.{local}.mlp.router.capacity_bins.{name}"
                    chunk[key] = value_of(name, layer, pipeline, expert, tensor).to(dtype)
    save(root, shards, training_args(MOE, grid))
    return hf


def load(target: Path) -> Any:
    return torch.load(target / "capacity_bins.pt", weights_only=True)


def test_bins_of_every_rank_are_nested_under_their_global_layer(tmp_path: Path) -> None:
    save_with_bins(tmp_path / "in", Grid(tp=2, pp=2, vpp=2, ep=2))
    assert convert(tmp_path / "in", tmp_path / "out", "--save-capacity-bins") == 0
    nested = load(tmp_path / "out")
    assert sorted(nested) == sorted(NAMES)
    # With two virtual stages of two layers, the first pipeline rank has layers 0, 1, 4, 5 and the second the rest.
    stages = {0: 0, 1: 0, 4: 0, 5: 0, 2: 1, 3: 1, 6: 1, 7: 1}
    for name in NAMES:
        assert sorted(nested[name]) == sorted(stages)
        for layer, pipeline in stages.items():
            by_pipeline = nested[name][layer]
            assert by_pipeline[1 - pipeline] == {0: {0: {}, 1: {}}, 1: {0: {}, 1: {}}}
            for expert in range(2):
                assert sorted(by_pipeline[pipeline][expert]) == [0, 1]
                for tensor in range(2):
                    found = by_pipeline[pipeline][expert][tensor]
                    assert found.dtype == torch.int64
                    assert torch.equal(found, value_of(name, layer, pipeline, expert, tensor))


def test_ranks_that_training_never_wrote_have_empty_slots(tmp_path: Path) -> None:
    save_with_bins(tmp_path / "in", Grid(tp=2, ep=4, etp=1))
    assert convert(tmp_path / "in", tmp_path / "out", "--save-capacity-bins") == 0
    by_expert = load(tmp_path / "out")["capacity_bins"][7][0]
    assert {(expert, tensor) for expert in range(4) for tensor in range(2) if len(by_expert[expert][tensor])} == {
        (0, 0), (1, 1), (2, 0), (3, 1),
    }  # fmt: skip
    assert torch.equal(by_expert[3][1], value_of("capacity_bins", 7, 0, 3, 1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bfloat16], ids=str)
def test_bins_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    save_with_bins(tmp_path / "in", Grid(), dtype)
    assert convert(tmp_path / "in", tmp_path / "out", "--save-capacity-bins") == 0
    found = load(tmp_path / "out")["bins_usage"][3][0][0][0]
    assert found.dtype == dtype
    assert torch.equal(found, value_of("bins_usage", 3, 0, 0, 0).to(dtype))


@pytest.mark.parametrize(("dtype", "name"), [(torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")], ids=str)
def test_a_bin_of_another_dtype_is_refused_by_name(
    dtype: torch.dtype, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_with_bins(tmp_path / "in", Grid(), dtype)
    assert convert(tmp_path / "in", tmp_path / "out", "--save-capacity-bins") == 1
    message = capsys.readouterr().err
    assert "capacity bins of an unexpected dtype\n" in message
    assert "tensor:   decoder.layers.0.mlp.router.capacity_bins." in message
    assert f"file:     {tmp_path}/in/iter_0000004/mp_rank_00/model_optim_rng.pt\n" in message
    assert f"found:    {name}\n" in message
    assert not (tmp_path / "out").exists()


def test_bins_are_left_behind_and_named_unless_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save_with_bins(tmp_path / "in", Grid())
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "capacity_bins.pt").exists()
    assert_same(read_tensors(tmp_path / "out"), hf)
    assert "not converted: 24 x capacity bins (statistics of training), 448 B\n" in capsys.readouterr().err


def test_a_model_without_bins_has_an_empty_file_of_them(tmp_path: Path) -> None:
    model = Model(layers=1)
    save(tmp_path / "in", megatron_shards(model, hf_tensors(model)), training_args(model))
    assert convert(tmp_path / "in", tmp_path / "out", "--save-capacity-bins") == 0
    assert load(tmp_path / "out") == {}
