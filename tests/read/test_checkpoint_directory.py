"""Which directory a `--load-path` means: the tracker file, `--ckpt-dir-name`, or the iteration's directory itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dist_convert.errors import CheckpointNotFound, CorruptFile
from dist_convert.formats.megatron.iterations import is_distributed, rank_files
from dist_convert.formats.open import shared_iteration
from dist_convert.models.catalog import NOTHING_ASKED, Where
from dist_convert.ranks.collectives import alone
from tests.checkpoints import Model, hf_tensors, make, megatron_shards, save, training_args
from tests.converting import assert_same, convert, read_tensors

TRACKER = "latest_checkpointed_iteration.txt"


def iteration_directory(root: Path, name: str | None) -> Path:
    return shared_iteration(Where(root, replace(NOTHING_ASKED, ckpt_dir_name=name)), alone())


def add_iteration(root: Path, name: str, *, shard: bytes = b"12345") -> Path:
    (root / name / "mp_rank_00").mkdir(parents=True)
    (root / name / "mp_rank_00/model_optim_rng.pt").write_bytes(shard)
    return root / name


def add_distributed(root: Path, name: str, marker: str) -> Path:
    (root / name).mkdir(parents=True)
    (root / name / marker).write_text("{}")
    (root / name / "__0_0.distcp").write_bytes(b"")
    return root / name


@pytest.mark.parametrize(
    ("text", "directory"),
    [
        ("4", "iter_0000004"), ("4\n", "iter_0000004"), ("  100 \n", "iter_0000100"), ("0000004", "iter_0000004"),
        ("0", "iter_0000000"), ("12345678", "iter_12345678"), ("release", "release"), ("release\n", "release"),
    ],
)  # fmt: skip
def test_the_tracker_file_names_the_iteration(text: str, directory: str, tmp_path: Path) -> None:
    add_iteration(tmp_path, "iter_0000003")
    wanted = add_iteration(tmp_path, directory)
    (tmp_path / TRACKER).write_text(text)
    assert iteration_directory(tmp_path, None) == wanted


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"four", b"-4", b"4.0", b"4 5", b"Release", b"\xff\xfe4", b"0x4", b"9" * 5000, b"../4"]
)
def test_a_tracker_file_that_names_no_iteration_is_refused(content: bytes, tmp_path: Path) -> None:
    add_iteration(tmp_path, "iter_0000004")
    (tmp_path / TRACKER).write_bytes(content)
    with pytest.raises(CorruptFile) as caught:
        iteration_directory(tmp_path, None)
    assert caught.value.file == str(tmp_path / TRACKER)
    assert "--ckpt-dir-name" in caught.value.remedy


def test_without_a_tracker_file_the_iterations_that_are_here_are_listed(tmp_path: Path) -> None:
    for name in ("iter_0000010", "iter_0000002", "release", "logs"):
        add_iteration(tmp_path, name)
    with pytest.raises(CheckpointNotFound, match=f"no {TRACKER}") as caught:
        iteration_directory(tmp_path, None)
    assert caught.value.found == "iter_0000002, iter_0000010, release"
    assert "--ckpt-dir-name" in caught.value.remedy


def test_a_directory_in_place_of_the_tracker_file_is_no_tracker_file(tmp_path: Path) -> None:
    (tmp_path / TRACKER).mkdir()
    with pytest.raises(CheckpointNotFound, match="no checkpoint"):
        iteration_directory(tmp_path, None)


@pytest.mark.parametrize("name", ["iter_0000002", "release", "iter_0000002/"])
def test_ckpt_dir_name_wins_over_the_tracker_file(name: str, tmp_path: Path) -> None:
    for directory in ("iter_0000002", "iter_0000004", "release"):
        add_iteration(tmp_path, directory)
    (tmp_path / TRACKER).write_text("4")
    assert iteration_directory(tmp_path, name) == tmp_path / name.rstrip("/")


@pytest.mark.parametrize("tracked", ["1", "0000001", "10000000"])
def test_an_iteration_does_not_match_one_whose_number_only_begins_alike(tracked: str, tmp_path: Path) -> None:
    add_iteration(tmp_path, "iter_0000010")
    (tmp_path / TRACKER).write_text(tracked)
    with pytest.raises(CheckpointNotFound, match="does not exist") as caught:
        iteration_directory(tmp_path, None)
    assert caught.value.file == str(tmp_path / f"iter_{int(tracked):07d}")
    assert caught.value.expected == "one of: iter_0000010"


@pytest.mark.parametrize("name", ["1", "iter_1", "iter_0000001", "iter_001000", "iter_0000010x"])
def test_ckpt_dir_name_is_a_whole_name(name: str, tmp_path: Path) -> None:
    add_iteration(tmp_path, "iter_0000010")
    with pytest.raises(CheckpointNotFound, match="does not exist"):
        iteration_directory(tmp_path, name)


def test_an_iteration_given_directly_needs_no_tracker_file(tmp_path: Path) -> None:
    directory = add_iteration(tmp_path, "iter_0000004")
    assert iteration_directory(directory, None).samefile(directory)


def test_a_root_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="does not exist") as caught:
        iteration_directory(tmp_path / "typo", None)
    assert caught.value.file == str(tmp_path / "typo")


def test_a_file_in_place_of_the_root_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("4")
    with pytest.raises(CheckpointNotFound) as caught:
        iteration_directory(tmp_path / "file", None)
    assert caught.value.file == str(tmp_path / "file")


@pytest.mark.parametrize("marker", ["metadata.json", ".metadata"])
@pytest.mark.parametrize("how", ["tracker", "flag", "directly"])
def test_the_iteration_of_a_distributed_checkpoint_is_found(marker: str, how: str, tmp_path: Path) -> None:
    directory = add_distributed(tmp_path, "iter_0000004", marker)
    (tmp_path / TRACKER).write_text("4")
    root = directory if how == "directly" else tmp_path
    found = iteration_directory(root, "iter_0000004" if how == "flag" else None)
    assert found.samefile(directory)
    assert is_distributed(found)


def test_only_rank_directories_with_a_shard_are_listed(tmp_path: Path) -> None:
    named = ("mp_rank_00", "mp_rank_01_002", "mp_rank_00_000_001", "mp_rank_100_1000")
    others = ("mp_rank_", "mp_rank_xx", "mp_rank_00_000_000_000", "other_00", "mp_rank_00.bak", "mp_rank_00 (copy)")
    for name in named + others:
        (tmp_path / "iter_0000004" / name).mkdir(parents=True)
        (tmp_path / "iter_0000004" / name / "model_optim_rng.pt").write_bytes(b"1234567")
    (tmp_path / "iter_0000004/mp_rank_02").mkdir()
    (tmp_path / "iter_0000004/mp_rank_03/model_optim_rng.pt").mkdir(parents=True)
    assert rank_files(tmp_path / "iter_0000004") == {
        "mp_rank_00/model_optim_rng.pt": 7,
        "mp_rank_00_000_001/model_optim_rng.pt": 7,
        "mp_rank_01_002/model_optim_rng.pt": 7,
        "mp_rank_100_1000/model_optim_rng.pt": 7,
    }


def test_a_release_checkpoint_converts(tmp_path: Path) -> None:
    expected = make(tmp_path / "megatron", Model(layers=1))
    (tmp_path / "megatron/iter_0000004").rename(tmp_path / "megatron/release")
    (tmp_path / "megatron" / TRACKER).write_text("release")
    assert convert(tmp_path / "megatron", tmp_path / "hf") == 0
    assert_same(read_tensors(tmp_path / "hf"), expected)


def test_the_iteration_that_the_flag_names_is_the_one_converted(tmp_path: Path) -> None:
    model = Model(layers=1)
    weights = {iteration: hf_tensors(model, seed=iteration) for iteration in (2, 4)}
    for iteration, hf in weights.items():
        save(tmp_path / "megatron", megatron_shards(model, hf), training_args(model), iteration=iteration)
    assert convert(tmp_path / "megatron", tmp_path / "hf", "--ckpt-dir-name", "iter_0000002") == 0
    assert_same(read_tensors(tmp_path / "hf"), weights[2])
    assert convert(tmp_path / "megatron/iter_0000004", tmp_path / "direct") == 0
    assert_same(read_tensors(tmp_path / "direct"), weights[4])
