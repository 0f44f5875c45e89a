"""Weights files of Hugging Face directories: where every tensor lies, and whether the index is right.

Witnesses: transformers and safetensors write the files, and their bytes at the offsets found are the tensors.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dist_convert.errors import (
    ConversionError,
    CorruptFile,
    InconsistentShards,
    MissingShard,
    MissingTensor,
    Problems,
    UnknownTensor,
    UnsafePickle,
    UnsupportedModel,
)
from dist_convert.formats.huggingface.read import (
    check_index,
    find_weights,
    header_from_json,
    header_to_json,
    read_config,
    read_index,
    read_weights_header,
)
from dist_convert.records import StoredTensor

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "I32": torch.int32}


def stored(name: str, file: str) -> StoredTensor:
    return StoredTensor(name, file, "F32", (2, 3), (3, 1), 64)


def headers(**names: list[str]) -> dict[str, dict[str, StoredTensor]]:
    """File `a` as "a.safetensors" and so on, with tensors of the given names."""
    return {f"{f}.safetensors": {name: stored(name, f"{f}.safetensors") for name in names[f]} for f in names}


def load(path: Path, tensor: StoredTensor) -> torch.Tensor:
    """The elements that a header points at, gathered by torch from the whole file's bytes."""
    item = TORCH[tensor.dtype].itemsize
    start = tensor.offset_bytes % item
    data = path.read_bytes()[start:]
    flat = torch.frombuffer(bytearray(data[: len(data) // item * item]), dtype=TORCH[tensor.dtype])
    return flat.as_strided(tensor.shape, tensor.strides, tensor.offset_bytes // item)


# Headers


def test_tensors_of_a_safetensors_file_are_found(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).to(torch.bfloat16), "c": torch.arange(6, dtype=torch.int32)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_weights_header(tmp_path / "model.safetensors", "model.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(load(tmp_path / "model.safetensors", found[name]), tensor), name


def test_tensors_of_a_pickled_file_are_found_as_views_of_their_storages(tmp_path: Path) -> None:
    base = torch.arange(40, dtype=torch.float32)
    tensors = {
        "whole": base,
        "later rows": base.view(8, 5)[3:6],
        "transposed": base.view(8, 5).t(),
        "a column": base.view(8, 5)[:, 2],
        "repeated": torch.tensor([[7.0], [8.0]]).expand(2, 3),
        "other dtype": torch.randn(2, 3).to(torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.randn(4)),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    found = read_weights_header(tmp_path / "pytorch_model.bin", "pytorch_model.bin")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape, name
        assert torch.equal(load(tmp_path / "pytorch_model.bin", found[name]), tensor), name
    assert found["transposed"].strides == (1, 5)


def test_what_a_torch_module_saves_is_a_flat_dict(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")  # an OrderedDict that carries _metadata
    found = read_weights_header(tmp_path / "pytorch_model.bin", "pytorch_model.bin")
    assert torch.equal(load(tmp_path / "pytorch_model.bin", found["weight"]), module.weight)
    assert sorted(found) == ["bias", "weight"]


@pytest.mark.parametrize(
    ("content", "error", "found"),
    [
        ({"model": {"a": torch.zeros(1)}, "epoch": 3}, UnsupportedModel, "model: dict, epoch: int"),
        ({"a": torch.zeros(1), 0: torch.zeros(1)}, UnsupportedModel, "0: Tensor"),
        ({"a": torch.zeros(1), 1 << 20_000: torch.zeros(1)}, CorruptFile, "UnpicklingError: a number of 20,001 bits"),
        ([torch.zeros(1)], CorruptFile, "list"),
        (torch.zeros(1), CorruptFile, "Tensor"),
        ({"a": torch.nn.Linear(1, 1)}, UnsafePickle, "torch.nn.modules.linear.Linear"),
    ],
    ids=["nested", "numbered", "with a huge number", "a list", "a tensor", "a module"],
)
def test_a_pickled_file_of_anything_but_tensors_by_name_is_refused(
    content: object, error: type[ConversionError], found: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(error) as caught:
        read_weights_header(tmp_path / "pytorch_model.bin", "pytorch_model.bin")
    assert caught.value.found == found
    assert caught.value.file == "pytorch_model.bin"


def test_a_tensor_that_reaches_past_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(4, 8)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    [pickled] = [name for name in records if name.endswith("data.pkl")]
    shape, larger = b"K\x04K\x08\x86", b"K\x05K\x08\x86"  # BININT1 4 or 5, BININT1 8, TUPLE2
    assert records[pickled].count(shape) == 1
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content.replace(shape, larger) if name == pickled else content)
    with pytest.raises(CorruptFile, match="a tensor reaches past its storage") as caught:
        read_weights_header(path, "pytorch_model.bin")
    error = caught.value
    assert (error.tensor, error.expected, error.found) == ("a", "at least 160 bytes in data/0", "128 bytes")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0, 7, 20, 100, -1])
def test_a_truncated_weights_file_is_named(name: str, kept: int, tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(40)}
    if name.endswith(".bin"):
        torch.save(tensors, tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept])
    with pytest.raises(CorruptFile) as caught:
        read_weights_header(tmp_path / name, name)
    assert caught.value.file == name


# What transformers saves


@pytest.mark.parametrize("max_shard_size", ["5GB", "4KB"])
def test_a_model_that_transformers_saved_is_read_whole(max_shard_size: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    found = {file: read_weights_header(tmp_path / file, file) for file in find_weights(tmp_path)}
    assert (len(found) > 1) == (max_shard_size == "4KB")
    _, index = read_index(tmp_path)
    assert (index is None) == (max_shard_size == "5GB")
    if index is not None:
        check_index(index, found)
    tensors = {name: load(tmp_path / t.file, t) for header in found.values() for name, t in header.items()}
    expected = model.state_dict()
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert read_config(tmp_path)["num_hidden_layers"] == 3


# The index against the files


def test_an_index_that_tells_the_truth_passes() -> None:
    check_index({"x": "a.safetensors", "y": "b.safetensors"}, headers(a=["x"], b=["y"]))


@pytest.mark.parametrize(
    ("index", "files", "error", "tensor", "file"),
    [
        ({"x": "a.safetensors", "y": "b.safetensors"}, headers(a=["x"]), MissingShard, "", "b.safetensors"),
        ({"x": "a.safetensors", "y": "a.safetensors"}, headers(a=["x"]), MissingTensor, "y", "a.safetensors"),
        ({"x": "a.safetensors"}, headers(a=["x", "y"]), UnknownTensor, "y", "a.safetensors"),
        ({"x": "a.safetensors"}, headers(a=["x"], b=["y"]), UnknownTensor, "y", "b.safetensors"),
        ({"x": "a.safetensors"}, headers(a=[], b=["x"]), InconsistentShards, "x", "a.safetensors"),
        ({"x": "a.safetensors"}, headers(a=["x"], b=["x"]), InconsistentShards, "x", "a.safetensors"),
    ],
    ids=["no file", "no tensor", "one more", "one more in an unnamed file", "elsewhere", "twice"],
)
def test_a_disagreement_with_the_index_is_named(
    index: dict[str, str],
    files: dict[str, dict[str, StoredTensor]],
    error: type[ConversionError],
    tensor: str,
    file: str,
) -> None:
    with pytest.raises(error) as caught:
        check_index(index, files)
    assert (caught.value.tensor, caught.value.file) == (tensor, file)
    assert caught.value.remedy


def test_all_disagreements_are_reported_together() -> None:
    index = {"w": "gone.safetensors", "v": "gone.safetensors", "x": "a.safetensors", "y": "b.safetensors"}
    with pytest.raises(Problems) as caught:
        check_index(index, headers(a=["y"], b=["z"]))
    assert [(type(p), p.tensor, p.expected) for p in caught.value.problems] == [
        (MissingShard, "", "2 tensors in it, according to the index"),
        (InconsistentShards, "y", "in b.safetensors only"),
        (MissingTensor, "x", ""),
        (UnknownTensor, "z", "only tensors in the index's weight_map"),
    ]


def test_headers_survive_json() -> None:
    given = {
        "a.safetensors": {"x": StoredTensor("x", "a.safetensors", "BF16", (2, 3), (3, 1), 4096)},
        "b.bin": {
            "t": StoredTensor("t", "b.bin", "F32", (3, 2), (1, 3), 64),
            "s": StoredTensor("s", "b.bin", "F32", (), (), 0),
        },
        "empty.bin": {},
    }
    sent = json.loads(json.dumps({file: header_to_json(tensors) for file, tensors in given.items()}))
    assert {file: header_from_json(file, header) for file, header in sent.items()} == given
