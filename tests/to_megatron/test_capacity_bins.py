"""Habana's capacity bins go back to the parallel grid that they came from, and to no other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.checkpoints import Grid, Model
from tests.converting import convert
from tests.distributed.interrupting import Runs
from tests.formats.test_capacity_bins import MOE, NAMES, save_with_bins
from tests.to_megatron import FILE, assert_same_shards, load, make_hf, read_shards, to_megatron

LOAD = ("--load-capacity-bins", "--iteration", "4", "--saver-transformer-impl", "local")


def save_and_convert(tmp_path: Path, grid: Grid, dtype: torch.dtype = torch.int64) -> None:
    """A checkpoint with bins, and its Hugging Face form with them."""
    save_with_bins(tmp_path / "trained", grid, dtype)
    assert convert(tmp_path / "trained", tmp_path / "hf", "--save-capacity-bins") == 0


@pytest.mark.parametrize(
    "grid",
    [Grid(), Grid(tp=2), Grid(ep=4), Grid(tp=2, pp=2, ep=2), Grid(pp=2, vpp=2, ep=2), Grid(tp=2, ep=4, etp=1)],
    ids=str,
)
def test_every_bin_returns_to_its_rank_stage_and_layer(grid: Grid, tmp_path: Path) -> None:
    save_and_convert(tmp_path, grid)
    assert to_megatron(tmp_path / "hf", tmp_path / "back", *LOAD, grid=grid) == 0
    back, trained = (
        {
            directory: [{name: value for name, value in chunk.items() if ".capacity_bins." in name} for chunk in chunks]
            for directory, chunks in read_shards(root, "iter_0000004").items()
        }
        for root in (tmp_path / "back", tmp_path / "trained")
    )
    assert sum(len(chunk) for chunks in trained.values() for chunk in chunks) == (
        len(trained) * len(NAMES) * MOE.layers // grid.pp
    )
    assert_same_shards(back, trained)


def test_the_args_say_how_many_bins_there_are(tmp_path: Path) -> None:
    save_and_convert(tmp_path, Grid())
    assert to_megatron(tmp_path / "hf", tmp_path / "back", *LOAD) == 0
    saved = load(tmp_path / "back" / "iter_0000004" / "mp_rank_00" / FILE)
    bins = saved["model"]["decoder.layers.0.mlp.router.capacity_bins.capacity_bins"]
    assert saved["args"].moe_capacity_bins_num == len(bins)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bfloat16], ids=str)
def test_bins_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    save_and_convert(tmp_path, Grid(), dtype)
    assert to_megatron(tmp_path / "hf", tmp_path / "back", *LOAD, "--target-params-dtype", "fp32") == 0
    name = "decoder.layers.7.mlp.router.capacity_bins.capacity_bins"
    back, trained = (
        read_shards(tmp_path / root, "iter_0000004")["mp_rank_00"][0][name] for root in ("back", "trained")
    )
    assert back.dtype == trained.dtype == dtype
    assert torch.equal(back, trained)


@pytest.mark.parametrize(
    ("trained", "grid"),
    [
        (Grid(), Grid(tp=2)), (Grid(), Grid(ep=2)), (Grid(), Grid(pp=2)), (Grid(tp=2), Grid()), (Grid(ep=2), Grid()),
        (Grid(pp=2), Grid()), (Grid(tp=2), Grid(ep=2)), (Grid(tp=2, ep=2), Grid(tp=2)),
        (Grid(tp=2, ep=4, etp=1), Grid(tp=2, ep=4)), (Grid(tp=2, ep=4), Grid(tp=2, ep=4, etp=1)),
    ],
    ids=str,
)  # fmt: skip
def test_bins_of_another_grid_are_refused(
    trained: Grid, grid: Grid, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_and_convert(tmp_path, trained)
    assert to_megatron(tmp_path / "hf", tmp_path / "back", *LOAD, grid=grid) == 2
    assert "the capacity bins are of another parallel grid" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_bins_are_left_out_unless_they_are_asked_for(tmp_path: Path) -> None:
    save_and_convert(tmp_path, Grid())
    assert to_megatron(tmp_path / "hf", tmp_path / "back") == 0
    assert [name for name in read_shards(tmp_path / "back")["mp_rank_00"][0] if "capacity_bins" in name] == []


def test_bins_that_are_not_there_or_damaged_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_and_convert(tmp_path, Grid())
    file = tmp_path / "hf" / "capacity_bins.pt"
    for content in (b"no bins", b"", None):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        assert to_megatron(tmp_path / "hf", tmp_path / "back", *LOAD) == (2 if content is None else 1)
        message = capsys.readouterr().err
        assert "capacity_bins.pt" in message
        assert "internal error" not in message
        assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("bins", [{}, {"capacity_bins": {0: {0: {0: {0: torch.ones(2, 2)}}}}}], ids=["none", "matrix"])
def test_a_file_without_vectors_of_bins_is_refused(
    bins: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_and_convert(tmp_path, Grid())
    torch.save(bins, tmp_path / "hf" / "capacity_bins.pt")
    assert to_megatron(tmp_path / "hf", tmp_path / "back", *LOAD) == 1
    assert "no capacity bins in the file" in capsys.readouterr().err


def test_bins_of_another_dtype_in_the_file_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_and_convert(tmp_path, Grid())
    file = tmp_path / "hf" / "capacity_bins.pt"
    torch.save({"bins_usage": {3: {0: {0: {0: torch.ones(2, dtype=torch.uint8)}}}}}, file)
    assert to_megatron(tmp_path / "hf", tmp_path / "back", *LOAD) == 1
    message = capsys.readouterr().err
    assert "capacity bins of an unexpected dtype\n" in message
    assert f"tensor:   bins_usage of layer 3\n  file:     {file}\n" in message
    assert "found:    U8\n" in message


@pytest.mark.parametrize(
    "values", [torch.ones(1).expand(1 << 40), torch.ones(0), torch.ones(1 << 20)], ids=["of one value", "none", "many"]
)
def test_a_bin_of_more_values_than_a_histogram_has_is_refused_unread(
    values: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_and_convert(tmp_path, Grid())
    torch.save({"bins_usage": {3: {0: {0: {0: values}}}}}, tmp_path / "hf" / "capacity_bins.pt")
    assert to_megatron(tmp_path / "hf", tmp_path / "back", *LOAD) == 1
    assert "no capacity bins, or too many\n  tensor:   bins_usage of layer 3\n" in capsys.readouterr().err


def test_nothing_that_a_file_of_bins_names_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_and_convert(tmp_path, Grid())
    torch.save({"bins_usage": os.system}, tmp_path / "hf" / "capacity_bins.pt")
    assert to_megatron(tmp_path / "hf", tmp_path / "back", *LOAD) == 1
    assert "the pickle names posix.system, which no checkpoint needs" in capsys.readouterr().err


@pytest.mark.parametrize("model", [Model(), MOE], ids=["dense", "dynamic experts"])
def test_bins_are_refused_where_training_has_no_place_for_them(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_hf(tmp_path / "hf", model)
    assert to_megatron(tmp_path / "hf", tmp_path / "out", LOAD[0], "--expert-layout", "habana-dynamic") == 2
    assert "the target has no place for capacity bins" in capsys.readouterr().err


def test_bins_that_were_replaced_while_a_conversion_lay_unfinished_are_refused(runs: Runs, tmp_path: Path) -> None:
    save_and_convert(tmp_path, Grid())
    bins = tmp_path / "hf" / "capacity_bins.pt"
    flags = ["hf-to-megatron", "--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "back"), *LOAD]
    flags += ["--device", "cpu"]
    assert runs.do(flags, rank=0, moment=20, signals=["SIGKILL"]).exit_codes == [-9]
    old = bins.read_bytes()
    bins.unlink()
    save_with_bins(tmp_path / "other", Grid(), torch.int32)
    assert convert(tmp_path / "other", tmp_path / "other-hf", "--save-capacity-bins") == 0
    bins.write_bytes((tmp_path / "other-hf" / "capacity_bins.pt").read_bytes())
    run = runs.do(flags)
    assert run.exit_codes == [1]
    assert "another unfinished conversion is in the target's .partial directory" in run.printed
    assert "argument capacity_bins.pt was" in run.printed
    bins.write_bytes(old)
    assert runs.do(flags).exit_codes == [0]
