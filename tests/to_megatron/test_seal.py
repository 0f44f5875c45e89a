"""Every file written is a sound container that torch reads with weights only, whole or mapped, whatever its dialect."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from tests.checkpoints import Grid, Model
from tests.to_megatron import EXPERTS, FILE, load, make_hf, to_megatron

#: Experts of more than a block (4 MiB), wider than a tile (1,024 columns), so that files are filled in many pieces.
LARGE = Model(hidden=1056, ffn=2080, heads=2, groups=2, head_dim=8, layers=1, vocab=99, experts=2)
DENSE = Model(hidden=1056, ffn=2080, heads=2, groups=2, head_dim=8, layers=2, vocab=99)


def shard_files(root: Path) -> list[Path]:
    return sorted(root.rglob(FILE))


def checksums(path: Path) -> dict[str, int]:
    """Of the storages, as the central directory has them."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename: info.CRC for info in archive.infolist() if "/data/" in info.filename}


@pytest.mark.parametrize("padding", ["last-row", "zeros"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_every_record_of_a_file_with_experts_has_its_true_checksum(experts: str, padding: str, tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", LARGE)
    flags = ("--expert-layout", experts, "--vocab-padding", padding)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", *flags, grid=Grid(tp=2)) == 0
    paths = shard_files(tmp_path / "megatron")
    assert len(paths) == 2
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        assert 0 not in checksums(path).values()


@pytest.mark.parametrize(
    "flags", [(), ("--placement", "gather"), ("--max-memory-per-rank", "64MB"), ("--fp16",)], ids=str
)
@pytest.mark.parametrize("grid", [Grid(), Grid(tp=2), Grid(tp=2, pp=2)], ids=str)
def test_every_record_of_a_dense_file_has_its_true_checksum(grid: Grid, flags: tuple[str, ...], tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", DENSE)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", *flags, grid=grid) == 0
    for path in shard_files(tmp_path / "megatron"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        assert 0 not in checksums(path).values()


def test_checksums_stand_beside_the_data_too_for_readers_that_never_see_the_directory(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", DENSE)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron") == 0
    [path] = shard_files(tmp_path / "megatron")
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as record:
                end = record._orig_compress_start + info.file_size  # type: ignore[attr-defined]
            if info.flag_bits & 8 and info.file_size:
                assert content[end : end + 8] == b"PK\x07\x08" + info.CRC.to_bytes(4, "little"), info.filename


@pytest.mark.parametrize("experts", EXPERTS)
def test_torch_maps_a_file_as_it_reads_it(experts: str, tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", Model(experts=4, groups=4))
    grid = Grid(tp=2, pp=2, vpp=2, ep=2)
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", "--expert-layout", experts, grid=grid) == 0
    for path in shard_files(tmp_path / "megatron"):
        whole, mapped = load(path), load(path, mmap=True)
        assert sorted(whole) == sorted(mapped) == ["args", "checkpoint_version", "iteration", "model0", "model1"]
        assert whole["args"] == mapped["args"]
        for stage in ("model0", "model1"):
            assert list(whole[stage]) == list(mapped[stage])
            assert all(torch.equal(whole[stage][name], tensor) for name, tensor in mapped[stage].items())


def test_tensors_are_parameters_of_their_own_storages_on_the_cpu(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", Model(experts=4, groups=4))
    flags = ("--expert-layout", "grouped")
    assert to_megatron(tmp_path / "hf", tmp_path / "megatron", *flags, grid=Grid(tp=2)) == 0
    model = load(shard_files(tmp_path / "megatron")[0])["model"]
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.values()}
    assert len(storages) == len(model)
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in model.values())
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in model.values())
