"""Skeletons of safetensors files: literal bytes, the order and alignment of tensors, shards and their index.

The witnesses are the safetensors library, which reads files made from the headers, and huggingface_hub, which
transformers divides tensors into files with.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open

from dist_convert.formats.huggingface.files import TensorSpec, index_json, lay_out_files
from dist_convert.records import DTYPE_BYTES, StoredTensor, TargetFile

MIXED: list[TensorSpec] = [
    ("b.weight", "BF16", (3, 5)), ("norm", "F32", (3,)), ("flag", "U8", (1,)), ("a.weight", "BF16", (2, 2)),
    ("scalar", "F64", ()), ("empty", "F16", (0, 4)), ("count", "I64", (2,)),
]  # fmt: skip
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "U8": torch.uint8,
}  # fmt: skip


def test_a_file_is_these_bytes_blanks_to_the_end_of_a_page_and_room_for_the_values() -> None:
    [file] = lay_out_files([("bb", "BF16", (2, 3)), ("a", "F32", (5,))], 1000)
    text = (
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"F32","shape":[5],"data_offsets":[0,20]},'
        b'"bb":{"dtype":"BF16","shape":[2,3],"data_offsets":[20,32]}}'
    )
    assert len(text) == 145
    assert file == TargetFile(
        name="model.safetensors",
        header=b"\xf8\x0f\x00\x00\x00\x00\x00\x00" + text + b" " * 3943,
        size_bytes=4096 + 32,
        tensors=(
            StoredTensor("a", "model.safetensors", "F32", (5,), (1,), 4096),
            StoredTensor("bb", "model.safetensors", "BF16", (2, 3), (3, 1), 4116),
        ),
    )


def test_safetensors_reads_the_values_that_were_written_at_the_offsets(tmp_path: Path) -> None:
    [file] = lay_out_files(MIXED, 1000)
    data = bytearray(file.header.ljust(file.size_bytes, b"\x00"))
    expected = {}
    for number, tensor in enumerate(file.tensors, start=1):
        value = torch.arange(number, number + tensor.elements).to(TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)
        expected[tensor.name] = value
        end = tensor.offset_bytes + tensor.size_bytes
        data[tensor.offset_bytes : end] = bytes(value.reshape(-1).view(torch.uint8).tolist())
    path = tmp_path / file.name
    path.write_bytes(data)
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert sorted(opened.keys()) == sorted(expected)
        for name, value in expected.items():
            found = opened.get_tensor(name)
            assert (found.dtype, found.shape) == (value.dtype, value.shape)
            assert torch.equal(found, value), name


def test_wider_elements_come_first_and_equally_wide_ones_keep_their_order() -> None:
    [file] = lay_out_files(MIXED, 1000)
    assert [tensor.name for tensor in file.tensors] == [
        "scalar", "count", "norm", "b.weight", "a.weight", "empty", "flag",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["w" * length for length in range(1, 10)])
def test_every_tensor_is_aligned_to_its_element_whatever_the_length_of_the_header(name: str) -> None:
    [file] = lay_out_files([(name, "U8", (3,)), *MIXED], 1000)
    assert len(file.header) % 4096 == 0
    assert all(tensor.offset_bytes % DTYPE_BYTES[tensor.dtype] == 0 for tensor in file.tensors)


def test_names_beyond_ascii_are_read_back(tmp_path: Path) -> None:
    [file] = lay_out_files([('tänzer."weight"', "U8", (1,))], 1000)
    (tmp_path / file.name).write_bytes(file.header + b"\x07")
    with safe_open(tmp_path / file.name, framework="pt") as opened:
        assert opened.get_tensor('tänzer."weight"').tolist() == [7]


def of_sizes(*sizes: int) -> list[TensorSpec]:
    return [(f"t{number}", "U8", (size,)) for number, size in enumerate(sizes)]


def names(files: tuple[TargetFile, ...]) -> list[list[str]]:
    return [[tensor.name for tensor in file.tensors] for file in files]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((4,), [["t0"]]),
        ((4, 6), [["t0", "t1"]]),
        ((4, 7), [["t0"], ["t1"]]),
        ((4, 4, 4, 4), [["t0", "t1"], ["t2", "t3"]]),
        ((25,), [["t0"]]),
        ((4, 25, 4), [["t1"], ["t0", "t2"]]),
        ((10, 0, 10), [["t0", "t1"], ["t2"]]),
    ],
)
def test_a_new_file_begins_where_the_next_tensor_would_exceed_ten_bytes(
    sizes: tuple[int, ...], expected: list[list[str]]
) -> None:
    assert names(lay_out_files(of_sizes(*sizes), 10)) == expected


def test_a_single_file_has_no_number_and_no_index() -> None:
    files = lay_out_files(of_sizes(1, 2), 10)
    assert [file.name for file in files] == ["model.safetensors"]
    assert index_json(files) is None


def test_several_files_are_numbered_from_one_and_have_an_index() -> None:
    files = lay_out_files([("a", "BF16", (2, 2)), ("b", "F32", (2,)), ("c", "BF16", (3,))], 10)
    first, second, third = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
    assert [file.name for file in files] == [first, second, third]
    assert index_json(files) == (
        "{\n"
        '  "metadata": {\n'
        '    "total_size": 22,\n'
        '    "total_parameters": 9\n'
        "  },\n"
        '  "weight_map": {\n'
        f'    "a": "{first}",\n'
        f'    "b": "{second}",\n'
        f'    "c": "{third}"\n'
        "  }\n"
        "}\n"
    )


@pytest.mark.parametrize("limit", [1, 10, 16, 23, 1000])
def test_files_and_index_are_those_of_save_pretrained(limit: int) -> None:
    sizes = [1] * 5 + [7, 3, 10, 2, 9] if limit >= 10 else [1] * 5
    files = lay_out_files(of_sizes(*sizes), limit)
    state = {name: torch.zeros(shape, dtype=torch.uint8) for name, _, shape in of_sizes(*sizes)}
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    assert {file.name: [tensor.name for tensor in file.tensors] for file in files} == split.filename_to_tensors
    text = index_json(files)
    if text is not None:
        index = json.loads(text)
        assert index["weight_map"] == split.tensor_to_filename
        assert index["metadata"]["total_size"] == split.metadata["total_size"]
