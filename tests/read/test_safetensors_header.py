"""Headers of `.safetensors` files: read as the safetensors library reads them, refused where it refuses them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dist_convert.errors import ConversionError, CorruptFile, SourceError
from dist_convert.formats.huggingface import read as huggingface
from dist_convert.formats.huggingface.read import read_weights_header

FILE = "model-00001-of-00002.safetensors"


def write(path: Path, header: bytes, data_bytes: int, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(data_bytes))
    return path


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused_by_library(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as opened:
            list(opened.keys())
    except (SafetensorError, OSError):
        return True
    return False


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=str)
def test_every_tensor_is_where_the_library_put_it(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 4), "a": torch.randn(5).bfloat16(), "c": torch.arange(6).view(2, 3), "é": torch.ones(1, 2),
        "scalar": torch.tensor(2.0, dtype=torch.float64), "empty": torch.zeros(0, 3), "cube": torch.ones(2, 3, 4),
    }  # fmt: skip
    save_file(tensors, tmp_path / "f", metadata)
    data = (tmp_path / "f").read_bytes()
    header = read_weights_header(tmp_path / "f", FILE)
    assert set(header) == set(tensors)
    for name, tensor in tensors.items():
        found = header[name]
        assert (found.name, found.file, found.shape) == (name, FILE, tuple(tensor.shape))
        assert found.strides == tensor.stride()
        stored = data[found.offset_bytes : found.offset_bytes + found.size_bytes]
        assert stored == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "F64"), (torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16"),
        (torch.int64, "I64"), (torch.int32, "I32"), (torch.int16, "I16"), (torch.int8, "I8"), (torch.uint8, "U8"),
        (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2"),
    ],
)  # fmt: skip
def test_every_dtype_keeps_its_name(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    save_file({"x": torch.ones(3).to(dtype)}, tmp_path / "f")
    assert read_weights_header(tmp_path / "f", FILE)["x"].dtype == name


LENGTHS = [0, 1, 2**40, 2**63, 2**64 - 1, 100_000_001, 3000]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_header_of_impossible_length_is_refused_unread(length: int, tmp_path: Path) -> None:
    path = write(tmp_path / "f", json.dumps({"x": entry()}).encode(), 16, length=length)
    assert refused_by_library(path)
    with pytest.raises(CorruptFile, match="no safetensors header") as caught:
        read_weights_header(path, FILE)
    assert caught.value.file == FILE
    assert caught.value.found == f"{length} bytes"


def test_a_header_above_the_limit_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "MAX_HEADER_BYTES", 20)
    path = write(tmp_path / "f", json.dumps({"x": entry()}).encode(), 16)
    with pytest.raises(CorruptFile, match="no safetensors header"):
        read_weights_header(path, FILE)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 20, -17, -16, -1])
def test_a_truncated_file_is_named(kept: int, tmp_path: Path) -> None:
    path = write(tmp_path / "f", json.dumps({"x": entry()}).encode(), 16)
    read_weights_header(path, FILE)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CorruptFile) as caught:
        read_weights_header(path, FILE)
    assert caught.value.file == FILE


#: Headers with 32 bytes of data behind them that the library refuses too.
DAMAGED: dict[str, bytes] = {
    name: header if isinstance(header, bytes) else json.dumps(header).encode()
    for name, header in {
        "no JSON": b"{ this is none }",
        "a list": [entry(offsets=(0, 32), shape=(8,))],
        "a number": b"12",
        "not UTF-8": b'{"\xff\xfe": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}',
        "UTF-16": json.dumps({"x": entry(shape=(8,), offsets=(0, 32))}).encode("utf-16"),
        "nested too deep": b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "dtype of no name": {"x": entry(None, (8,), (0, 32))},
        "no dtype": {"x": {"shape": [8], "data_offsets": [0, 32]}},
        "entry is text": {"x": "F32"},
        "entry is null": {"x": None},
        "shape is a number": {"x": entry(shape=8, offsets=(0, 32))},
        "shape of text": {"x": entry(shape=("8",), offsets=(0, 32))},
        "shape of fractions": {"x": entry(shape=(8.0,), offsets=(0, 32))},
        "negative shape": {"x": entry(shape=(-2, -4), offsets=(0, 32))},
        "shape too small": {"x": entry(shape=(7,), offsets=(0, 32))},
        "shape of 2^64": {"x": entry(shape=(2**32, 2**32), offsets=(0, 32))},
        "one offset": {"x": entry(shape=(8,), offsets=(0,))},
        "no offsets": {"x": entry(shape=(8,), offsets=())},
        "three offsets": {"x": entry(shape=(8,), offsets=(0, 32, 64))},
        "offsets of text": {"x": entry(shape=(8,), offsets=("0", "32"))},
        "offsets of fractions": {"x": entry(shape=(8,), offsets=(0.0, 32.0))},
        "negative offset": {"x": entry(shape=(10,), offsets=(-8, 32))},
        "past the end": {"x": entry(shape=(9,), offsets=(0, 36))},
        "behind the end": {"x": entry(shape=(8,), offsets=(32, 64))},
        "offsets backwards": {"x": entry(shape=(8,), offsets=(32, 0))},
        "overlapping": {"x": entry(shape=(8,), offsets=(0, 32)), "y": entry(offsets=(16, 32))},
        "partly overlapping": {"x": entry(shape=(5,), offsets=(0, 20)), "y": entry(shape=(4,), offsets=(16, 32))},
        "bytes of no tensor": {"x": entry(), "y": entry(shape=(2,), offsets=(24, 32))},
    }.items()
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_header_is_refused(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path / "f", DAMAGED[damage], 32)
    assert refused_by_library(path)
    with pytest.raises(CorruptFile) as caught:
        read_weights_header(path, FILE)
    assert caught.value.file == FILE


@pytest.mark.parametrize("second", [entry(shape=(8,), offsets=(0, 32)), entry(shape=(4, 2), offsets=(0, 32))], ids=str)
def test_two_tensors_of_one_name_are_refused(second: dict[str, Any], tmp_path: Path) -> None:
    """The format disallows duplicate keys; its library and json.loads both keep the last one."""
    first = json.dumps(entry(shape=(8,), offsets=(0, 32)))
    path = write(tmp_path / "f", f'{{"x":{first},"x":{json.dumps(second)}}}'.encode(), 32)
    with pytest.raises(CorruptFile) as caught:
        read_weights_header(path, FILE)
    assert caught.value.file == FILE


@pytest.mark.parametrize("place", ["a directory", "nothing"])
def test_what_is_no_file_is_named(place: str, tmp_path: Path) -> None:
    path = tmp_path if place == "a directory" else tmp_path / "gone"
    with pytest.raises(SourceError) as caught:
        read_weights_header(path, FILE)
    assert caught.value.file == FILE


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 150), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4))
def test_a_damaged_file_raises_nothing_untyped(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]]
) -> None:
    path = write(
        tmp_path_factory.getbasetemp() / "f", json.dumps({"x": entry(), "y": entry(offsets=(16, 32))}).encode(), 32
    )
    data = bytearray(path.read_bytes())
    for at, value in changes:
        data[at : at + len(value)] = value
    path.write_bytes(data)
    try:
        tensors = read_weights_header(path, FILE).values()
    except ConversionError:
        return
    assert all(8 < tensor.offset_bytes <= tensor.offset_bytes + tensor.size_bytes <= len(data) for tensor in tensors)
