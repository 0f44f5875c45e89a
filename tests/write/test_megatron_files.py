"""`model_optim_rng.pt` before any data: what torch loads once values lie at the offsets, and what cannot be written.

The witness is `torch.load`, with `weights_only` and with `mmap`, of files that were filled by plain positioned writes.
"""

from __future__ import annotations

import argparse
import os
import resource
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_convert.errors import PlanError, TargetError
from dist_convert.formats.huggingface.files import TensorSpec
from dist_convert.formats.pickles import Named
from dist_convert.formats.torch.shards import read_shard
from dist_convert.formats.torch.target import lay_out_shard
from dist_convert.records import DTYPE_BYTES
from tests.write import write_shard

FILE = "mp_rank_00/model_optim_rng.pt"
GIB = 1 << 30
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64, "C128": torch.complex128,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


ARGS: dict[str, object] = {
    "num_layers": 2, "norm_epsilon": 1e-05, "swiglu": True, "tokenizer_model": None, "normalization": "RMSNorm",
    "params_dtype": Named("torch", "bfloat16"), "main_grads_dtype": Named("torch", "float32"),
    "layout": [["embedding", "decoder"], ["decoder", "loss"]], "betas": (0.9, 0.95), "seed": 1 << 40,
    "extra": {"dtype": Named("torch", "float16"), 3: False},
}  # fmt: skip
#: Every kind of shape, several dtypes, and an order that is not that of names or sizes.
MIXED: list[TensorSpec] = [
    ("norm.weight", "F32", (5,)), ("a.weight", "BF16", (3, 7)), ("scalar", "I64", ()), ("empty", "F16", (0, 4)),
    ("cube", "F64", (2, 1, 3)), ("flags", "BOOL", (9,)), ("b.weight", "BF16", (1, 1)), ("last.empty", "BF16", (4, 0)),
]  # fmt: skip
VIRTUAL: list[list[TensorSpec]] = [
    [("embedding", "BF16", (6, 4)), ("layers.0.weight", "BF16", (4, 4))],
    [("layers.0.weight", "BF16", (4, 4)), ("layers.0.bias", "F32", (4,))],
    [],
    [("layers.0.weight", "BF16", (4, 4)), ("head", "BF16", (6, 4))],
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / FILE
    path.parent.mkdir()
    return path


def load(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    return loaded


def values(spec: TensorSpec, seed: int) -> torch.Tensor:
    """Random bits; of bool, random values."""
    _, dtype, shape = spec
    random = torch.Generator().manual_seed(seed)
    count = DTYPE_BYTES[dtype]
    for length in shape:
        count *= length
    bits = torch.randint(0, 2 if dtype == "BOOL" else 256, (count,), generator=random, dtype=torch.uint8)
    return bits.view(TORCH_DTYPES[dtype]).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def fill(path: Path, chunks: list[list[TensorSpec]]) -> list[dict[str, torch.Tensor]]:
    """Write random values where the file's header says that they go."""
    filled = []
    descriptor = os.open(path, os.O_WRONLY)
    for virtual, specs in enumerate(chunks):
        filled.append({spec[0]: values(spec, 100 * virtual + number) for number, spec in enumerate(specs)})
        for name, stored in read_shard(path, FILE).chunks[virtual].items():
            os.pwrite(descriptor, bits(filled[-1][name]), stored.offset_bytes)
    os.close(descriptor)
    return filled


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize(
    ("keys", "chunks"), [(["model"], [MIXED]), (["model0", "model1", "model2", "model3"], VIRTUAL)]
)
def test_torch_loads_the_values_that_were_written_at_the_offsets(
    path: Path, keys: list[str], chunks: list[list[TensorSpec]], mmap: bool
) -> None:
    write_shard(path.parent, path.name, ARGS, 7, chunks)
    filled = fill(path, chunks)
    loaded = load(path, mmap=mmap)
    assert list(loaded) == ["args", "checkpoint_version", "iteration", *keys]
    for key, specs, expected in zip(keys, chunks, filled, strict=True):
        assert type(loaded[key]) is OrderedDict
        assert list(loaded[key]) == [name for name, _, _ in specs]
        for name, dtype, shape in specs:
            assert loaded[key][name].dtype == TORCH_DTYPES[dtype]
            assert loaded[key][name].shape == shape
            assert bits(loaded[key][name]) == bits(expected[name])


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_dtype_is_loaded_as_itself(path: Path, dtype: str) -> None:
    specs: list[TensorSpec] = [("w", dtype, (3, 5))]
    write_shard(path.parent, path.name, ARGS, 7, [specs])
    [filled] = fill(path, [specs])
    tensor = load(path)["model"]["w"]
    assert tensor.dtype == TORCH_DTYPES[dtype]
    assert bits(tensor) == bits(filled["w"])


def test_every_tensor_is_contiguous_and_has_a_storage_of_its_own(path: Path) -> None:
    write_shard(path.parent, path.name, ARGS, 7, [MIXED])
    model = load(path)["model"]
    for tensor in model.values():
        assert type(tensor) is torch.Tensor
        assert (tensor.stride(), tensor.storage_offset()) == (torch.empty(tensor.shape).stride(), 0)
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert not tensor.requires_grad
    model["norm.weight"].fill_(1)
    assert [name for name, tensor in model.items() if tensor.any()] == ["norm.weight"]


def test_the_args_are_a_namespace_with_real_torch_dtypes(path: Path) -> None:
    write_shard(path.parent, path.name, ARGS, 7, [MIXED])
    loaded = load(path)
    assert type(loaded["args"]) is argparse.Namespace
    assert vars(loaded["args"]) == {
        "num_layers": 2,
        "norm_epsilon": 1e-05,
        "swiglu": True,
        "tokenizer_model": None,
        "normalization": "RMSNorm",
        "params_dtype": torch.bfloat16,
        "main_grads_dtype": torch.float32,
        "layout": [["embedding", "decoder"], ["decoder", "loss"]],
        "betas": (0.9, 0.95),
        "seed": 1099511627776,
        "extra": {"dtype": torch.float16, 3: False},
    }
    assert (loaded["checkpoint_version"], loaded["iteration"]) == (3.0, 7)


def test_values_never_written_are_zeros_and_writing_them_does_not_change_the_size(path: Path) -> None:
    write_shard(path.parent, path.name, ARGS, 7, [MIXED])
    size_bytes = path.stat().st_size
    assert not any(tensor.any() for tensor in load(path)["model"].values())
    fill(path, [MIXED])
    assert path.stat().st_size == size_bytes


@pytest.mark.parametrize("chunks", [[MIXED], VIRTUAL, [[("w", "F8_E4M3", (3, 5)), ("e", "U16", (0,))]]])
def test_the_layout_in_memory_is_what_is_read_from_the_file(path: Path, chunks: list[list[TensorSpec]]) -> None:
    write_shard(path.parent, path.name, ARGS, 7, chunks)
    shard, container = lay_out_shard(ARGS, 7, chunks, FILE)
    assert shard.chunks == read_shard(path, FILE).chunks
    assert shard.size_bytes == container.size_bytes == path.stat().st_size
    assert all(place.offset_bytes % 64 == 0 for chunk in shard.chunks for place in chunk.values())


@pytest.fixture
def address_space_limit() -> Iterator[None]:
    """This process may not reserve more than another GiB of memory, used or not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now_bytes + GIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.usefixtures("address_space_limit")
def test_a_shard_of_sixty_gigabytes_takes_neither_disk_nor_memory(path: Path) -> None:
    write_shard(
        path.parent,
        path.name,
        ARGS,
        7,
        [[(f"layers.{layer}.weight", "BF16", (10_000, 10_000)) for layer in range(300)]],
    )
    assert path.stat().st_size > 60_000_000_000
    assert path.stat().st_blocks * 512 < 4_000_000


def test_values_beyond_four_gibibytes_are_found_by_torch(path: Path) -> None:
    specs: list[TensorSpec] = [("first", "U8", (3 * GIB,)), ("huge", "U8", (5 * GIB,)), ("far", "BF16", (GIB, 3))]
    write_shard(path.parent, path.name, ARGS, 7, [specs])
    stored = read_shard(path, FILE).chunks[0]
    with path.open("r+b") as file:
        for name, mark in (("first", b"\x01\x02"), ("huge", b"\x03\x04"), ("far", b"\x80\x3f")):  # 1.0 in bfloat16
            file.seek(stored[name].offset_bytes + stored[name].size_bytes - 2)
            file.write(mark)
    model = load(path, mmap=True)["model"]
    assert [model[name][-3:].tolist() for name in ("first", "huge")] == [[0, 1, 2], [0, 3, 4]]
    assert model["far"][-2:].tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        Path("/tokenizer"),
        {1, 2},
        torch.float32,
        Text("text"),
        Named("torch", "Tensor"),
        Named("torch", "bf16"),
        [object()],
    ],
)
def test_an_argument_that_a_restricted_reader_could_not_load_is_refused_by_name(path: Path, value: object) -> None:
    with pytest.raises(PlanError) as caught:
        write_shard(path.parent, path.name, {"num_layers": 2, "strange": value}, 7, [MIXED])
    assert "'strange'" in caught.value.what
    assert not path.exists()


def test_two_tensors_of_one_name_are_refused(path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        write_shard(path.parent, path.name, ARGS, 7, [[("a", "F32", (1,)), ("w", "F32", (1,)), ("w", "F32", (2,))]])
    assert (caught.value.tensor, caught.value.file) == ("w", str(path))


def test_values_that_are_there_already_stay(path: Path) -> None:
    write_shard(path.parent, path.name, ARGS, 7, [MIXED])
    fill(path, [MIXED])
    before = path.read_bytes()
    write_shard(path.parent, path.name, ARGS, 7, [MIXED])
    assert path.read_bytes() == before


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """Files of this process may not grow beyond 1 MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("file_size_limit")
def test_a_file_system_that_refuses_is_a_typed_error(path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        write_shard(path.parent, path.name, ARGS, 7, [[("w", "F32", (1 << 20,))]])
    assert (caught.value.file, caught.value.found) == (str(path), "File too large")
