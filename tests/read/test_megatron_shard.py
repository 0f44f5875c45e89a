"""One rank's file: its tensors are where torch.load finds them, its args become JSON, and other files are refused."""

from __future__ import annotations

import enum
import io
import json
import os
import pathlib
import sys
import types
import zipfile
from argparse import Namespace
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_convert.errors import ConversionError, CorruptFile, MissingArguments, UnsupportedModel
from dist_convert.formats.torch.shards import Shard, read_shard, shard_from_json, shard_to_json
from dist_convert.records import StoredTensor
from tests.checkpoints import Grid, Model, make

FILE = "mp_rank_00/model_optim_rng.pt"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}  # fmt: skip


def save(path: Path, model: Any, **more: Any) -> Shard:
    torch.save({"args": Namespace(num_layers=1), "checkpoint_version": 3.0, "model": model, **more}, path)
    return read_shard(path, FILE)


def read_plainly(path: Path, tensor: StoredTensor) -> torch.Tensor:
    """The tensor by one system call and `as_strided`, without the converter."""
    dtype = DTYPES[tensor.dtype]
    if not tensor.elements:
        return torch.empty(tensor.shape, dtype=dtype)
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    with path.open("rb") as file:
        data = bytearray(os.pread(file.fileno(), (reach + 1) * dtype.itemsize, tensor.offset_bytes))
    return torch.frombuffer(data, dtype=dtype).as_strided(tensor.shape, tensor.strides)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def assert_as_torch_loads(path: Path, chunk: dict[str, StoredTensor], loaded: dict[str, Any]) -> None:
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    assert set(chunk) == set(tensors)
    for name, value in tensors.items():
        found = read_plainly(path, chunk[name])
        assert found.dtype == value.dtype, name
        assert found.shape == value.shape, name
        assert torch.equal(bits(found), bits(value.detach())), name


FLAT = torch.arange(5000, dtype=torch.bfloat16)
STORED = {
    "whole": torch.randn(5, 7), "view at an offset": FLAT[100:180].view(8, 10), "end of a buffer": FLAT[4990:],
    "transposed": torch.randn(4, 6).T, "steps": torch.randn(6, 9)[:, ::3], "inner block": torch.randn(9, 9)[2:5, 3:7],
    "expanded row": torch.randn(1, 4).expand(3, 4), "expanded column": torch.randn(4, 1).expand(4, 3),
    "expanded scalar": torch.tensor(2.5).expand(3, 2), "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4),
    "three dimensions": torch.randn(2, 3, 4).permute(2, 0, 1), "parameter": torch.nn.Parameter(torch.randn(3)),
    "same storage": FLAT.view(50, 100), "far apart": torch.randn(100_000)[::33_333], "kept grad": torch.ones(2),
}  # fmt: skip


def test_tensors_of_every_layout_lie_where_torch_loads_them(tmp_path: Path) -> None:
    path = tmp_path / "model_optim_rng.pt"
    shard = save(path, STORED)
    assert_as_torch_loads(path, shard.chunks[0], torch.load(path, weights_only=False)["model"])


@pytest.mark.parametrize("name", DTYPES)
def test_tensors_of_every_dtype_lie_where_torch_loads_them(name: str, tmp_path: Path) -> None:
    values = torch.arange(24).remainder(2 if name == "BOOL" else 100).to(DTYPES[name])
    path = tmp_path / "model_optim_rng.pt"
    shard = save(path, {"first": torch.ones(3), "view": values.view(6, 4)[1:, 1:3]})
    assert shard.chunks[0]["view"].dtype == name
    assert_as_torch_loads(path, shard.chunks[0], torch.load(path, weights_only=False, mmap=True)["model"])


@pytest.mark.parametrize("grid", [Grid(), Grid(tp=2, pp=2), Grid(pp=2, vpp=2), Grid(tp=2, ep=2, etp=1)], ids=str)
def test_every_file_of_a_checkpoint_reads_as_torch_loads_it(grid: Grid, tmp_path: Path) -> None:
    make(tmp_path, Model(experts=4 if grid.ep > 1 else 0), grid)
    for path in sorted(tmp_path.glob("*/*/*.pt")):
        loaded = torch.load(path, weights_only=False)
        shard = read_shard(path, FILE)
        keys = ["model"] if grid.vpp == 1 else [f"model{number}" for number in range(grid.vpp)]
        assert len(shard.chunks) == len(keys)
        for key, chunk, opaque in zip(keys, shard.chunks, shard.opaque, strict=True):
            assert_as_torch_loads(path, chunk, loaded[key])
            assert set(opaque) == set(loaded[key]) - set(chunk)
        assert shard.size_bytes == path.stat().st_size
        assert shard.iteration == 4


def test_entries_that_are_no_tensors_are_listed_by_kind(tmp_path: Path) -> None:
    shard = save(tmp_path / "f.pt", OrderedDict(a=None, b=io.BytesIO(b"x"), c=torch.zeros(2), d=b"x", e={}))
    assert list(shard.chunks[0]) == ["c"]
    assert shard.opaque[0] == {"a": "NoneType", "b": "_io.BytesIO", "d": "_codecs.encode", "e": "dict"}


def test_names_of_virtual_stages_are_told_apart(tmp_path: Path) -> None:
    make(tmp_path, Model(layers=2), Grid(vpp=2))
    shard = read_shard(tmp_path / "iter_0000004" / FILE, FILE)
    name = "decoder.layers.0.input_layernorm.weight"
    assert [chunk[name].name for chunk in shard.chunks] == [f"model0.{name}", f"model1.{name}"]


@pytest.mark.parametrize("grid", [Grid(), Grid(vpp=2)], ids=str)
def test_a_header_that_travelled_as_json_is_equal(grid: Grid, tmp_path: Path) -> None:
    make(tmp_path, grid=grid)
    shard = read_shard(tmp_path / "iter_0000004" / FILE, FILE)
    assert shard_from_json(json.loads(json.dumps(shard_to_json(shard)))) == shard


ARGS: dict[str, tuple[Any, Any]] = {
    "int": (4, 4), "float": (1e-5, 1e-5), "text": ("rope", "rope"), "none": (None, None), "flag": (True, True),
    "list": ([1, [2]], [1, [2]]), "tuple": ((1, 2), [1, 2]), "dict": ({"a": (1,)}, {"a": [1]}),
    "number as key": ({1: 2}, {"1": 2}), "dtype": (torch.bfloat16, "torch.bfloat16"),
    "absolute path": (pathlib.PurePosixPath("/a/b/c"), "/a/b/c"), "path": (pathlib.PurePosixPath("a/b"), "a/b"),
    "root": (pathlib.PurePosixPath("/"), "/"), "namespace": (Namespace(a=1), {"a": 1}), "set": ({3}, [3]),
    "simple namespace": (types.SimpleNamespace(a=torch.float16), {"a": "torch.float16"}),
    "tensor inside": ([torch.zeros(2)[1:]], None), "frozenset": (frozenset({3}), [3]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARGS)
def test_args_become_json_values(kind: str, tmp_path: Path) -> None:
    value, expected = ARGS[kind]
    torch.save({"args": Namespace(x=value), "checkpoint_version": 3.0, "model": {}}, tmp_path / "f.pt")
    found = read_shard(tmp_path / "f.pt", FILE).args["x"]
    assert json.loads(json.dumps(found)) == (found if expected is None else expected)


@pytest.mark.parametrize("by_name", [False, True], ids=["class(value)", "getattr(class, name)"])
def test_enum_members_become_their_text(by_name: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which form is written depends on the Python that saved."""
    module = "megatron.core.transformer.enums"
    for name in ("megatron", "megatron.core", "megatron.core.transformer", module):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    backend: Any = enum.Enum("AttnBackend", "flash fused unfused local auto", module=module)
    sys.modules[module].AttnBackend = backend  # type: ignore[attr-defined]
    form = (getattr, (backend, "auto")) if by_name else (backend, (5,))
    monkeypatch.setattr(backend, "__reduce_ex__", lambda *_: form)
    torch.save({"args": Namespace(x=backend.auto), "checkpoint_version": 3.0, "model": {}}, tmp_path / "f.pt")
    assert read_shard(tmp_path / "f.pt", FILE).args["x"] == "AttnBackend.auto"


OLD_NAMES = {"language_model": {"encoder": {"layers.0.attention.query_key_value.weight": torch.zeros(1)}}}


@pytest.mark.parametrize("version", [{}, {"checkpoint_version": 1.0}, {"checkpoint_version": "3.0"}], ids=str)
def test_the_version_of_a_checkpoint_of_megatron_core_does_not_matter(version: dict[str, Any], tmp_path: Path) -> None:
    model = {"decoder.layers.0.self_attention.linear_qkv.weight": torch.zeros(1)}
    torch.save({"args": Namespace(num_layers=1), "model": model, **version}, tmp_path / "f.pt")
    assert list(read_shard(tmp_path / "f.pt", FILE).chunks[0]) == list(model)


@pytest.mark.parametrize(
    ("saved", "error", "says"),
    [
        ([1], CorruptFile, "not a checkpoint file"),
        ({}, MissingArguments, "an empty dict"),
        ({"model": {}}, MissingArguments, "found:    model: dict"),
        ({"args": [1], "model": {}}, MissingArguments, "argparse.Namespace"),
        ({"args": Namespace(num_layers=1), "model": OLD_NAMES}, UnsupportedModel, "older than version 2"),
        (
            {"args": Namespace(num_layers=1), "checkpoint_version": 1.0, "model": OLD_NAMES},
            UnsupportedModel,
            "found:    1.0",
        ),
        ({"args": Namespace(num_layers=1), "checkpoint_version": 3.0}, CorruptFile, "holds no model"),
        ({"args": Namespace(num_layers=1), "checkpoint_version": 3.0, "model": [1]}, CorruptFile, "holds no model"),
        ({"args": Namespace(num_layers=1), "checkpoint_version": 3.0, "model1": {}}, CorruptFile, "holds no model"),
    ],
)
def test_files_that_cannot_be_converted_are_refused_with_the_reason(
    saved: Any, error: type[ConversionError], says: str, tmp_path: Path
) -> None:
    torch.save(saved, tmp_path / "f.pt")
    with pytest.raises(error) as caught:
        read_shard(tmp_path / "f.pt", FILE)
    assert caught.value.file == FILE
    assert says in str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 3998, 3999])
def test_a_tensor_that_reaches_past_its_storage_is_named(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    save(path, {"norm": torch.zeros(2000, dtype=torch.bfloat16)[1000:]})
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data[:kept] if name.endswith("data/0") else data)
    with pytest.raises(CorruptFile, match="reaches past its storage") as caught:
        read_shard(path, FILE)
    assert (caught.value.file, caught.value.tensor) == (FILE, "norm")
    assert caught.value.expected == "at least 4000 bytes in data/0"
    assert caught.value.found == f"{kept} bytes"


def without_checksums(shard: Shard) -> dict[str, Any]:
    """The header; a wrong checksum of a tensor tells of a difference where there is none, and moves nothing."""
    chunks = tuple({name: replace(t, checksum=None) for name, t in chunk.items()} for chunk in shard.chunks)
    return shard_to_json(replace(shard, chunks=chunks))


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_no_single_wrong_byte_moves_a_tensor_or_raises_anything_untyped(flip: int, tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    whole = without_checksums(save(path, {"norm": torch.ones(4), "head": torch.zeros(3, 4).T}))
    data = path.read_bytes()
    harmless = 0
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
        try:
            assert without_checksums(read_shard(path, FILE)) == whole, f"byte {at}"
            harmless += 1
        except ConversionError as error:
            assert error.file == FILE, f"byte {at}"  # noqa: PT017
    assert 64 < harmless < len(data) // 2 + 512  # the weights and the padding may be anything, the pickle may not
