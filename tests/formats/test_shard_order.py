"""Rank directories that hold the shard of another one: copied twice, or swapped."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, make, megatron_shards, save, training_args
from tests.converting import convert, read_tensors

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
