"""What of a `torch_dist` checkpoint is damaged, incomplete or of another kind is named before a byte moves."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, StorageMeta, TensorStorageMetadata

import dist_convert
from dist_convert.__main__ import main
from dist_convert.errors import Cancelled
from tests.checkpoints import Grid, Model, make
from tests.converting import assert_same, convert, read_tensors
from tests.distributed_checkpoints import make_distributed

LLAMA = Model()
DIRECTORY = "dist/iter_0000004"


def change_metadata(directory: Path, change: Callable[[Any], object]) -> None:
    """Change torch's own `Metadata` and write it back."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def chunk_of(metadata: Any, key: str) -> Any:
    """The first chunk's place."""
    return next(place for index, place in metadata.storage_data.items() if index.fqn == key)


NORM, QKV = "decoder.final_layernorm.weight", "decoder.layers.self_attention.linear_qkv.weight"


def _escape(metadata: Any) -> None:
    chunk_of(metadata, NORM).relative_path = "../__0_0.distcp"


def _overlap(metadata: Any) -> None:
    chunk_of(metadata, QKV).length += 100


def _past_the_end(metadata: Any) -> None:
    chunk_of(metadata, QKV).length = 1 << 40


def _wrong_dtype(metadata: Any) -> None:
    metadata.state_dict_metadata[NORM].properties.dtype = torch.float32


def _without_a_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata[QKV].chunks.pop()


def _chunk_twice(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata[QKV].chunks
    chunks[1] = chunks[0]


def _compressed(metadata: Any) -> None:
    chunk_of(metadata, QKV).transform_descriptors = ["zstd"]


def _without_a_place(metadata: Any) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == NORM)
    del metadata.storage_data[index]


def _unknown_key(metadata: Any) -> None:
    metadata.state_dict_metadata["decoder.layers.mystery.weight"] = metadata.state_dict_metadata.pop(NORM)
    index = next(index for index in metadata.storage_data if index.fqn == NORM)
    metadata.storage_data[type(index)("decoder.layers.mystery.weight", index.offset)] = metadata.storage_data.pop(index)


def _unknown_object(metadata: Any) -> None:
    key = next(key for key in metadata.state_dict_metadata if "_extra_state" in key)
    index = next(index for index in metadata.storage_data if index.fqn == key)
    metadata.state_dict_metadata["decoder.layers.codebook/shard_0_1"] = metadata.state_dict_metadata[key]
    metadata.storage_data[type(index)("decoder.layers.codebook/shard_0_1")] = metadata.storage_data[index]


def _long_name(metadata: Any) -> None:
    chunk_of(metadata, NORM).relative_path = 300 * "a"


def _half_a_surrogate_pair(metadata: Any) -> None:
    chunk_of(metadata, NORM).relative_path = "\ud800"


def _shared_list(metadata: Any) -> None:
    """Two bytes for each chunk, and a list that many tensors have: few bytes, and hours of work."""
    listed = metadata.state_dict_metadata[NORM]
    empty = ChunkStorageMetadata(torch.Size([0]), torch.Size([0]))
    shared = TensorStorageMetadata(listed.properties, torch.Size([0]), [empty] * 20_000)
    for number in range(50):
        metadata.state_dict_metadata[f"optimizer.state.{number}"] = replace(shared)


def _huge_number(metadata: Any) -> None:
    chunk_of(metadata, NORM).offset = 1 << 70


def _without_a_key(metadata: Any) -> None:
    del metadata.state_dict_metadata[NORM]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_escape, ("damaged .metadata", "../__0_0.distcp", "bare name")),
        (_overlap, ("a blob reaches into the next one or past its file", "__0_0.distcp")),
        (_past_the_end, ("a blob reaches into the next one or past its file", "__0_0.distcp")),
        (_wrong_dtype, ("a blob differs from what .metadata says", NORM, "F32", "BF16")),
        (_without_a_chunk, ("damaged .metadata", QKV)),
        (_chunk_twice, ("a blob reaches into the next one or past its file", "__0_0.distcp")),
        (_compressed, ("compressed or otherwise changed", QKV, "transform_descriptors")),
        (_without_a_place, ("damaged .metadata", f"one blob of {NORM}")),
        (_unknown_key, ("decoder.layers.mystery.weight has no place in a llama model",)),
        (_unknown_object, ("decoder.layers.codebook/shard_0_1 has no place",)),
        (_long_name, ("damaged .metadata", "bare name")),
        (_half_a_surrogate_pair, ("damaged .metadata", "bare name", r"\ud800")),
        (_shared_list, ("damaged .metadata", "chunks, as many as a file of its size can list", "optimizer.state.0")),
        (_huge_number, ("damaged .metadata", "the offset and length of a blob in __0_0.distcp")),
        (_without_a_key, (f"no tensor for {NORM}",)),
    ],
)
def test_a_damaged_metadata_is_named(
    change: Callable[[Any], object], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_distributed(tmp_path / "dist", LLAMA, Grid(tp=2))
    change_metadata(tmp_path / DIRECTORY, change)
    assert convert(tmp_path / "dist", tmp_path / "hf") == 1
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == [], error
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("second", ["args", "common_state/shard_1_2"])
def test_args_that_are_stored_twice_are_refused(
    second: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_distributed(tmp_path / "dist", common="object")

    def change(metadata: Any) -> None:
        first = next(index for index in metadata.storage_data if index.fqn == "common_state/shard_0_1")
        metadata.state_dict_metadata[second] = metadata.state_dict_metadata[first.fqn]
        metadata.storage_data[type(first)(second)] = metadata.storage_data[first]

    change_metadata(tmp_path / DIRECTORY, change)
    assert convert(tmp_path / "dist", tmp_path / "hf") == 1
    error = capsys.readouterr().err
    assert "the args are stored twice" in error
    assert f"found:    common_state/shard_0_1, {second}\n" in error


def _remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _cut(directory: Path) -> None:
    data = (directory / "__1_0.distcp").read_bytes()
    (directory / "__1_0.distcp").write_bytes(data[:-50])


def _of_another_kind(directory: Path) -> None:
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))


def _without_args(directory: Path) -> None:
    torch.save({"iteration": 4}, directory / "common.pt")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove(".metadata"), ("no rank sees .metadata", "interrupted")),
        (_remove("__1_0.distcp"), ("on no rank's disk", "1 missing: __1_0.distcp")),
        (_remove("common.pt"), ("the checkpoint has no args", "common.pt")),
        (_cut, ("past its file", "__1_0.distcp")),
        (_of_another_kind, ("of another kind", "zarr", "--ckpt-format torch_dist")),
        (_without_args, ("the checkpoint has no args", "common.pt", "iteration")),
    ],
)
def test_an_incomplete_directory_is_named_file_by_file(
    damage: Callable[[Path], None], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_distributed(tmp_path / "dist", LLAMA, Grid(tp=2))
    damage(tmp_path / DIRECTORY)
    assert convert(tmp_path / "dist", tmp_path / "hf") > 0
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == [], error
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("command", [["convert", "--to", "huggingface"], ["inspect"]])
def test_two_formats_in_one_directory_are_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_distributed(tmp_path / "dist", LLAMA)
    make(tmp_path / "torch", LLAMA)
    shutil.copytree(tmp_path / "torch/iter_0000004", tmp_path / DIRECTORY, dirs_exist_ok=True)
    target = [str(tmp_path / "hf")] if command[0] == "convert" else []
    assert main([command[0], str(tmp_path / "dist"), *target, *command[1:]]) == 1
    error = capsys.readouterr().err
    assert "two checkpoints in one directory" in error
    assert "mp_rank_*" in error


def test_args_of_another_model_are_named_once_for_each_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_distributed(tmp_path / "dist", LLAMA, num_layers=3)
    assert convert(tmp_path / "dist", tmp_path / "hf") == 1
    error = capsys.readouterr().err
    assert "6 problems found" in error
    assert error.count("[3, 32, 16] from the args") == 1
    assert f"file:     {tmp_path / DIRECTORY / '__0_0.distcp'}\n" in error


def test_args_that_changed_after_a_conversion_was_stopped_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_distributed(tmp_path / "dist", LLAMA)
    with pytest.raises(Cancelled):
        dist_convert.convert(tmp_path / "dist", tmp_path / "hf", to="huggingface", cancel=lambda: True)
    path = tmp_path / DIRECTORY / "common.pt"
    common = torch.load(path, weights_only=False)
    common["args"].rotary_base = 10000
    torch.save(common, path)
    assert convert(tmp_path / "dist", tmp_path / "hf") > 0
    assert "--overwrite" in capsys.readouterr().err


def test_what_only_names_the_save_is_no_part_of_the_source(tmp_path: Path) -> None:
    hf = make_distributed(tmp_path / "dist", LLAMA)
    with pytest.raises(Cancelled):
        dist_convert.convert(tmp_path / "dist", tmp_path / "hf", to="huggingface", cancel=lambda: True)
    named = StorageMeta(checkpoint_id="/elsewhere", save_id="another")
    change_metadata(tmp_path / DIRECTORY, lambda metadata: setattr(metadata, "storage_meta", named))
    assert convert(tmp_path / "dist", tmp_path / "hf") == 0
    assert_same(read_tensors(tmp_path / "hf"), hf)
