"""Which files of a Hugging Face directory hold the weights, and that no index or link leads out of the directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dist_convert.errors import CheckpointNotFound, CorruptFile, InconsistentShards
from dist_convert.formats.huggingface.read import find_weights, read_config, read_index

SAFETENSORS_INDEX, PICKLED_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


def write_index(directory: Path, *files: Any, name: str = SAFETENSORS_INDEX) -> None:
    weight_map = {f"tensor{number}": file for number, file in enumerate(files)}
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def touch(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).write_bytes(b"")


# Which files


@pytest.mark.parametrize(
    ("present", "found"),
    [
        (("model.safetensors",), "model.safetensors"),
        (("model.safetensors", "pytorch_model.bin"), "model.safetensors"),
        (("model.safetensors", PICKLED_INDEX), "model.safetensors"),
        ((SAFETENSORS_INDEX, "pytorch_model.bin"), "model-1.safetensors"),
        ((SAFETENSORS_INDEX, PICKLED_INDEX), "model-1.safetensors"),
        (("pytorch_model.bin",), "pytorch_model.bin"),
        ((PICKLED_INDEX,), "pytorch_model-1.bin"),
    ],
)
def test_safetensors_come_before_pickled_weights(present: tuple[str, ...], found: str, tmp_path: Path) -> None:
    for name in present:
        touch(tmp_path, name)
    if SAFETENSORS_INDEX in present:
        write_index(tmp_path, "model-1.safetensors")
    if PICKLED_INDEX in present:
        write_index(tmp_path, "pytorch_model-1.bin", name=PICKLED_INDEX)
    assert find_weights(tmp_path) == (found,)


def test_files_of_an_index_are_named_once_and_need_not_be_here(tmp_path: Path) -> None:
    write_index(tmp_path, "b.safetensors", "a.safetensors", "b.safetensors", "below/c.safetensors")
    assert find_weights(tmp_path) == ("a.safetensors", "b.safetensors", "below/c.safetensors")


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors")
    write_index(tmp_path, "model.safetensors")
    assert find_weights(tmp_path) == ("model.safetensors",)


@pytest.mark.parametrize(
    ("single", "index", "sharded"),
    [
        ("model.safetensors", SAFETENSORS_INDEX, "model-00001-of-00001.safetensors"),
        ("pytorch_model.bin", PICKLED_INDEX, "pytorch_model-00001-of-00001.bin"),
    ],
)
def test_a_single_file_beside_the_index_of_others_is_ambiguous(
    single: str, index: str, sharded: str, tmp_path: Path
) -> None:
    touch(tmp_path, single)
    write_index(tmp_path, sharded, name=index)
    match = f"two sets of weights: {single}(?s:.*)give a directory that has only the right ones"
    with pytest.raises(InconsistentShards, match=match):
        find_weights(tmp_path)


def test_the_index_tells_the_file_of_each_tensor(tmp_path: Path) -> None:
    write_index(tmp_path, "b.safetensors", "a.safetensors")
    assert read_index(tmp_path)[1] == {"tensor0": "b.safetensors", "tensor1": "a.safetensors"}


def test_a_single_file_has_no_index(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors")
    assert read_index(tmp_path)[1] is None


def test_weights_without_a_config_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors")
    with pytest.raises(CheckpointNotFound, match=r"no config\.json beside the weights"):
        read_config(tmp_path)


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound) as caught:
        find_weights(tmp_path / "missing")
    assert caught.value.file == str(tmp_path / "missing")
    assert caught.value.remedy == "check the path on every node"


def test_a_directory_without_weights_is_shown_with_what_is_in_it(tmp_path: Path) -> None:
    touch(tmp_path, "adapter_model.safetensors", "config.json")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointNotFound) as caught:
        find_weights(tmp_path)
    assert caught.value.found == "adapter_model.safetensors, config.json, model.safetensors"


# Hostile and damaged indexes


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors", "a/../../x.safetensors", "a/../x.safetensors", "/etc/x.safetensors", "./x.safetensors",
        "a//x.safetensors", "", ".", "..", "/etc/passwd", "x.txt", "x", ".safetensors", "x.safetensors\0",
        "x.SAFETENSORS", "x\n.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors", None, 7,
        ["x.safetensors"], {},
    ],
    ids=lambda name: repr(name)[:24],
)  # fmt: skip
def test_an_index_names_only_weights_files_inside_the_directory(name: object, tmp_path: Path) -> None:
    write_index(tmp_path, "good.safetensors", name)
    with pytest.raises(CorruptFile) as caught:
        find_weights(tmp_path)
    assert caught.value.file == SAFETENSORS_INDEX


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a.safetensors"]}', '{"weight_map": null}']
)
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / SAFETENSORS_INDEX).write_text(text)
    with pytest.raises(CorruptFile, match="index"):
        find_weights(tmp_path)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/hostname", "../missing"])
def test_a_link_out_of_the_directory_is_refused(target: str, indexed: bool, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"")
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.safetensors").symlink_to(target)
    if indexed:
        write_index(directory, "model.safetensors")
    with pytest.raises(CorruptFile, match=r"model\.safetensors is a link to a file outside the directory") as caught:
        find_weights(directory)
    assert caught.value.found == os.path.realpath(directory / target)


def test_a_linked_directory_inside_leads_out_too(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "below").symlink_to("..")
    write_index(tmp_path / "model", "below/x.safetensors")
    with pytest.raises(CorruptFile, match="a link to a file outside the directory"):
        find_weights(tmp_path / "model")


def test_links_inside_the_directory_and_to_the_directory_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    touch(tmp_path / "real", "weights.safetensors")
    (tmp_path / "real" / "model.safetensors").symlink_to("weights.safetensors")
    (tmp_path / "link").symlink_to("real")
    assert find_weights(tmp_path / "link") == ("model.safetensors",)


def hub_snapshot(root: Path, link: str) -> Path:
    """A directory as huggingface_hub's cache has it, with a link in place of the weights."""
    snapshot = root / "models--org--name" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (root / "models--org--name" / "blobs").mkdir()
    touch(root / "models--org--name" / "blobs", "f00d")
    (snapshot / "model.safetensors").symlink_to(link)
    return snapshot


def test_links_of_the_hub_cache_to_its_blobs_are_followed(tmp_path: Path) -> None:
    assert find_weights(hub_snapshot(tmp_path, "../../blobs/f00d")) == ("model.safetensors",)


@pytest.mark.parametrize("link", ["../../f00d", "../../blobs/../f00d", "../../../models--org--other/blobs/f00d"])
def test_other_links_out_of_a_hub_cache_are_refused(link: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="a link to a file outside the directory"):
        find_weights(hub_snapshot(tmp_path, link))
