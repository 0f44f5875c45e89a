"""Rank directories that hold the shard of another one: copied twice, or swapped."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import dist_convert
from dist_convert.__main__ import main
from dist_convert.errors import InconsistentShards, SourceError
from dist_convert.formats.megatron.grid import Grid as MegatronGrid
from dist_convert.formats.torch.copies import _place_of
from dist_convert.move.report import report_text
from tests.checkpoints import Grid, Model, make, megatron_shards, save, training_args
from tests.converting import convert, read_tensors
from tests.distributed_checkpoints import make_distributed

LLAMA, MIXTRAL = Model(heads=4, groups=4), Model(experts=4, heads=4, groups=4)


@pytest.mark.parametrize(
    ("model", "grid", "original", "copy"),
    [
        (LLAMA, Grid(tp=2), "mp_rank_00", "mp_rank_01"),
        (LLAMA, Grid(tp=4, pp=2), "mp_rank_03_001", "mp_rank_02_001"),
        (LLAMA, Grid(pp=4), "mp_rank_00_001", "mp_rank_00_002"),
        (MIXTRAL, Grid(ep=2), "mp_rank_00_001", "mp_rank_00_000"),
        (MIXTRAL, Grid(tp=2, ep=4, etp=1), "mp_rank_00_002", "mp_rank_01_003"),
    ],
    ids=str,
)
def test_a_shard_that_was_copied_twice_is_named_with_its_twin(
    model: Model, grid: Grid, original: str, copy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "source", model, grid)
    iteration = tmp_path / "source" / "iter_0000004"
    file = f"{copy}/model_optim_rng.pt"
    shutil.copy(iteration / original / "model_optim_rng.pt", iteration / file)
    assert convert(tmp_path / "source", tmp_path / "hf") == 1
    message = capsys.readouterr().err
    assert "two rank directories hold the same shard" in message or "copies of one parameter differ" in message
    assert str(iteration / copy) in message
    assert str(iteration / original) in message
    assert not (tmp_path / "hf").exists()


def test_shards_of_one_value_are_alike_and_no_fault(tmp_path: Path) -> None:
    hf = make(tmp_path / "unused", LLAMA, Grid(tp=2))
    ones = {name: torch.ones_like(tensor) for name, tensor in hf.items()}
    save(tmp_path / "source", megatron_shards(LLAMA, ones, Grid(tp=2)), training_args(LLAMA, Grid(tp=2)))
    assert convert(tmp_path / "source", tmp_path / "hf") == 0


def with_ranks(root: Path, ranks: dict[str, int]) -> dict[str, torch.Tensor]:
    """A checkpoint whose args have the rank of the process that saved each file."""
    hf = make(root / "unused", LLAMA, Grid(tp=2, pp=2))
    shards = megatron_shards(LLAMA, hf, Grid(tp=2, pp=2))
    args = vars(training_args(LLAMA, Grid(tp=2, pp=2)))
    for name, chunks in shards.items():
        save(root / "source", {name: chunks}, Namespace(**args, rank=ranks[name]))
    return hf


RIGHT = {"mp_rank_00_000": 0, "mp_rank_01_000": 1, "mp_rank_00_001": 2, "mp_rank_01_001": 3}


@pytest.mark.parametrize("ranks", [RIGHT, dict.fromkeys(RIGHT, 0), dict.fromkeys(RIGHT, 3)], ids=["own", "0", "3"])
def test_ranks_that_fit_or_say_nothing_are_no_fault(ranks: dict[str, int], tmp_path: Path) -> None:
    with_ranks(tmp_path, ranks)
    assert convert(tmp_path / "source", tmp_path / "hf") == 0


def test_swapped_shards_are_named_and_a_flag_accepts_the_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = with_ranks(tmp_path, RIGHT | {"mp_rank_00_001": 3, "mp_rank_01_001": 2})
    assert convert(tmp_path / "source", tmp_path / "hf") == 1
    message = capsys.readouterr().err
    assert "holds the shard of another tensor parallel rank" in message
    assert "args.rank 3, which is tensor parallel rank 1" in message
    assert str(tmp_path / "source/iter_0000004/mp_rank_00_001") in message
    assert convert(tmp_path / "source", tmp_path / "hf", "--accept-shard-order", "--verify") == 0
    assert torch.equal(read_tensors(tmp_path / "hf")["lm_head.weight"], hf["lm_head.weight"])
    assert json.loads((tmp_path / "hf" / "conversion.json").read_text())["flags"]["accept_shard_order"] is True
    assert main(["verify", str(tmp_path / "source"), str(tmp_path / "hf")]) == 0


def test_places_of_ranks_are_those_of_megatron() -> None:
    """As `RankGenerator` of Megatron-Core 0.16.1 numbers 16 processes at TP2, PP2, EP2 and two replicas."""
    ours = MegatronGrid(2, 2, 1, 2, 2)
    places = [_place_of(rank, {"world_size": 16}, ours) for rank in range(16)]
    assert [place["tensor"] for place in places] == [0, 1] * 8
    assert [place["expert"] for place in places] == [0, 0, 1, 1] * 4
    assert [place["pipeline"] for place in places] == [0] * 8 + [1] * 8


@pytest.mark.parametrize("args", [{}, {"world_size": 16, "use_tp_pp_dp_mapping": True}, {"world_size": 6}], ids=str)
def test_where_the_order_of_ranks_is_not_sure_only_the_tensor_rank_is_told(args: dict[str, object]) -> None:
    assert _place_of(3, args, MegatronGrid(2, 2, 1, 2, 2)) == {"tensor": 1}


@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_stage_under_the_name_of_another_is_named(is_swapped: bool, tmp_path: Path) -> None:
    grid = Grid(pp=2)
    hf = make(tmp_path / "unused", LLAMA, grid)
    for number, (name, chunks) in enumerate(megatron_shards(LLAMA, hf, grid).items()):
        rank = 1 - number if is_swapped else number
        save(tmp_path / "in", {name: chunks}, Namespace(**vars(training_args(LLAMA, grid)), rank=rank, world_size=2))
    found = str(dist_convert.inspect(tmp_path / "in").get("not_convertible"))
    assert ("holds the shard of another pipeline parallel rank" in found) is is_swapped


@pytest.mark.parametrize("name", ["seed", "world_size", "consumed_train_samples"])
def test_a_shard_of_another_run_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = make(tmp_path / "unused", LLAMA, Grid(tp=2))
    for number, (file, chunks) in enumerate(megatron_shards(LLAMA, hf, Grid(tp=2)).items()):
        args = Namespace(**vars(training_args(LLAMA, Grid(tp=2))), **{name: 1234 + number})
        save(tmp_path / "source", {file: chunks}, args)
    assert convert(tmp_path / "source", tmp_path / "hf") == 1
    message = capsys.readouterr().err
    assert f"two shards disagree about {name}, so they come from different runs" in message
    assert str(tmp_path / "source/iter_0000004/mp_rank_01") in message
    assert convert(tmp_path / "source", tmp_path / "hf", "--accept-shard-order") == 0
    assert f"warning: accepted: two shards disagree about {name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "grid", "original", "copy"),
    [(LLAMA, Grid(tp=2), "mp_rank_00", "mp_rank_01"), (MIXTRAL, Grid(ep=2), "mp_rank_00_001", "mp_rank_00_000")],
    ids=str,
)
def test_a_copied_shard_is_found_without_checksums(
    model: Model, grid: Grid, original: str, copy: str, tmp_path: Path
) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        make(tmp_path / "source", model, grid)
    finally:
        torch.serialization.set_crc32_options(before)
    assert "not_convertible" not in dist_convert.inspect(tmp_path / "source")
    iteration = tmp_path / "source" / "iter_0000004"
    shutil.copy(iteration / original / "model_optim_rng.pt", iteration / copy / "model_optim_rng.pt")
    assert "two rank directories hold the same shard" in dist_convert.inspect(tmp_path / "source")["not_convertible"]
    with pytest.raises(InconsistentShards, match="two rank directories hold the same shard"):
        dist_convert.open(tmp_path / "source")


@pytest.mark.parametrize("kind", ["torch", "torch_dist"])
def test_an_iteration_under_another_ones_name_is_a_warning_that_strict_refuses(kind: str, tmp_path: Path) -> None:
    (make if kind == "torch" else make_distributed)(tmp_path / "in", LLAMA)  # type: ignore[operator]
    root = tmp_path / "in/iter_0000004"
    assert "warnings" not in dist_convert.inspect(root)
    root = root.rename(tmp_path / "in/iter_0000100")
    warning = "warning: iter_0000100 holds files of iteration 4; the files are right"
    assert dist_convert.inspect(root)["warnings"] == [warning]
    with pytest.raises(SourceError, match="--strict, and 1 warning"):
        dist_convert.convert(root, tmp_path / "hf", to="huggingface", strict=True)
    assert not (tmp_path / "hf").exists()
    report = dist_convert.convert(root, tmp_path / "hf", to="huggingface")
    assert warning in report.notes
    assert report_text(report).endswith(", 1 warning")
    assert json.loads((tmp_path / "hf/conversion.json").read_text())["warnings"] == [warning]
