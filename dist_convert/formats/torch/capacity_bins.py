"""Habana's capacity bins: small tuning statistics, kept for a later conversion back to the same grid.

They are written as `capacity_bins.pt` in the nesting that Habana's converter uses,
`{name: {global layer: {pipeline: {expert: {tensor: tensor}}}}}` (docs/formats.md, "Capacity bins").
"""

import io
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_convert.errors import CheckpointNotFound, CorruptFile, UnsupportedModel, UsageError
from dist_convert.formats.megatron.grid import SHARD_FILE, Chunk, Grid, Rank, grid_ranks, rank_directory, written_ranks
from dist_convert.formats.megatron.names import CAPACITY_BINS, capacity_bin, layer_of, normalise
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.shards import Shard
from dist_convert.read.file_reader import TORCH_DTYPES
from dist_convert.read.source import opened_source
from dist_convert.records import DTYPE_BYTES, StoredTensor, counted, local_name
from dist_convert.write.files import write_file

FILE = "capacity_bins.pt"
_DTYPES = {"I64": torch.int64, "I32": torch.int32, **TORCH_DTYPES}

#: (file, virtual stage, local layer, name, dtype, values): one bin tensor, as it travels between ranks.
Bin = tuple[str, int, int, str, str, list[float]]
#: (layer, pipeline, expert, tensor, name) -> dtype and values.
Bins = Mapping[tuple[int, int, int, int, str], tuple[str, list[float]]]


def read_bins(directory: Path, shards: Iterable[Shard]) -> list[Bin]:
    """Read the capacity bins of the shards that this rank answers for."""
    found: list[Bin] = []
    for shard in shards:
        for virtual, chunk in enumerate(shard.chunks):
            for stored_name, tensor in chunk.items():
                prefix, _, name = normalise(stored_name).partition(CAPACITY_BINS)
                layer = layer_of(prefix)
                if name and layer is not None:
                    found.append((shard.file, virtual, layer, name, tensor.dtype, _read(directory, tensor)))
    return found


def _read(directory: Path, tensor: StoredTensor) -> list[float]:
    path = directory / tensor.file
    if tensor.dtype not in _DTYPES:
        raise _unexpected(tensor.dtype, tensor.name, str(path), "--save-capacity-bins")
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    with opened_source(path, str(path)) as file:
        file.seek(tensor.offset_bytes)
        data = bytearray(file.read(span * DTYPE_BYTES[tensor.dtype]))
    stored = torch.frombuffer(data, dtype=_DTYPES[tensor.dtype])
    values: list[float] = stored.as_strided(tensor.shape, tensor.strides).flatten().tolist()
    return values


def _unexpected(dtype: str, name: str, file: str, flag: str) -> UnsupportedModel:
    return UnsupportedModel(
        "capacity bins of an unexpected dtype",
        tensor=name,
        file=file,
        expected=", ".join(_DTYPES),
        found=dtype,
        remedy=f"leave {flag} out",
    )


def write_bins(target: Path, catalog: TorchCatalog, bins: Iterable[Bin]) -> None:
    """Write the bins of all ranks as `capacity_bins.pt`; slots without one are empty dicts."""
    places = {f"{rank_directory(catalog.grid, rank)}/{SHARD_FILE}": rank for rank in grid_ranks(catalog.grid)}
    first_layer = {(chunk.pipeline, chunk.virtual): chunk.first_layer for chunk in catalog.chunks}
    nested: dict[str, Any] = {}
    for file, virtual, local_layer, name, dtype, values in bins:
        rank = places[local_name(file)]
        layer = first_layer[rank.pipeline, virtual] + local_layer
        slots = nested.setdefault(name, {}).setdefault(layer, _empty_slots(catalog))
        slots[rank.pipeline][rank.expert][rank.tensor] = torch.tensor(values, dtype=_DTYPES[dtype])
    content = io.BytesIO()
    torch.save(nested, content)
    write_file(target, FILE, content.getvalue())


def _empty_slots(catalog: TorchCatalog) -> dict[int, Mapping[int, dict[int, Any]]]:
    grid = catalog.grid
    return {
        pipeline: {expert: {tensor: {} for tensor in range(grid.tensor)} for expert in range(grid.expert)}
        for pipeline in range(grid.pipeline)
    }


def load_bins(path: Path) -> Bins:
    """The bins of a `capacity_bins.pt`.

    Raises:
        CheckpointNotFound: there is no such file.
        CorruptFile: it is not of the nesting that `write_bins` writes.
        UnsupportedModel: bins of another dtype.
    """
    if not path.is_file():
        raise CheckpointNotFound(f"no {FILE}", file=str(path), remedy="leave --load-capacity-bins out")
    names = {dtype: name for name, dtype in _DTYPES.items()}
    try:
        found = {
            (layer, pipeline, expert, tensor, name): (names.get(values.dtype) or str(values.dtype), values.tolist())
            for name, layers in torch.load(path, weights_only=True).items()
            for layer, pipelines in layers.items()
            for pipeline, experts in pipelines.items()
            for expert, tensors in experts.items()
            for tensor, values in tensors.items()
            if isinstance(values, torch.Tensor) and values.dim() == 1
        }
    except (AttributeError, EOFError, KeyError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise CorruptFile("damaged capacity bins", file=str(path), found=f"{type(error).__name__}: {error}") from error
    for (layer, *_, name), (dtype, _) in found.items():
        if dtype not in _DTYPES:
            raise _unexpected(dtype, f"{name} of layer {layer}", str(path), "--load-capacity-bins")
    if not found:
        raise CorruptFile(
            "no capacity bins in the file",
            file=str(path),
            expected="vectors, by name, layer, pipeline, expert and tensor rank",
            remedy="leave --load-capacity-bins out",
        )
    return found


def place_bins(
    bins: Bins, grid: Grid, chunks: Sequence[Chunk]
) -> dict[tuple[str, int], dict[str, tuple[str, list[float]]]]:
    """The bins that each file holds: (file, virtual stage) -> name there -> dtype and values.

    Args:
        bins: of `load_bins`.
        grid, chunks: of the target.

    Raises:
        UsageError: the bins are of another grid; each rank has its own, so they fit no other.
    """
    chunk_of = {layer: c for c in chunks for layer in range(c.first_layer, c.first_layer + c.layers)}
    stages = {chunk.pipeline for chunk in chunk_of.values()}
    wanted = {rank for rank in written_ranks(grid) if rank.pipeline in stages}
    held = {Rank(pipeline, tensor, expert) for _, pipeline, expert, tensor, _ in bins}
    astray = {layer for layer, pipeline, *_ in bins if layer not in chunk_of or chunk_of[layer].pipeline != pipeline}
    if astray or held != wanted:
        raise UsageError(
            "the capacity bins are of another parallel grid",
            file=FILE,
            expected=f"bins of {counted(len(wanted), 'rank')} of {grid}",
            found=f"bins of {counted(len(held), 'rank')}, {counted(len(astray), 'layer')} on other stages",
            remedy="choose the grid that they were saved from, or leave --load-capacity-bins out",
        )
    found: dict[tuple[str, int], dict[str, tuple[str, list[float]]]] = {}
    for (layer, pipeline, expert, tensor, name), values in sorted(bins.items()):
        chunk, directory = chunk_of[layer], rank_directory(grid, Rank(pipeline, tensor, expert))
        of_file = found.setdefault((f"{directory}/{SHARD_FILE}", chunk.virtual), {})
        of_file[capacity_bin(layer - chunk.first_layer, name)] = values
    return found


def packed(dtype: str, values: Sequence[float]) -> bytes:
    """The bytes of a bin tensor."""
    data: bytes = torch.tensor(values, dtype=_DTYPES[dtype]).view(torch.uint8).numpy().tobytes()
    return data
