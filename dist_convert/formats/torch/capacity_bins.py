"""Habana's capacity bins: small tuning statistics, kept for a later conversion back to the same grid.

They are written as `capacity_bins.pt` in the nesting that Habana's converter uses,
`{name: {global layer: {pipeline: {expert: {tensor: tensor}}}}}` (docs/formats.md, "Capacity bins").
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from operator import mul
from pathlib import Path
from typing import Any

import torch

from dist_convert.errors import CheckpointNotFound, CorruptFile, UnsupportedModel, UsageError, below
from dist_convert.formats.megatron.grid import SHARD_FILE, Chunk, Grid, Rank, grid_ranks, rank_directory, written_ranks
from dist_convert.formats.megatron.names import CAPACITY_BINS, capacity_bin, layer_of, normalise
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.shards import Shard
from dist_convert.read.file_reader import TORCH_DTYPES
from dist_convert.read.restricted_pickle import Tensor
from dist_convert.read.source import opened_source
from dist_convert.read.torch_file import open_dict, place_tensors
from dist_convert.records import DTYPE_BYTES, StoredTensor, counted
from dist_convert.write.files import Directory, write_file

FILE = "capacity_bins.pt"
_DTYPES = {"I64": torch.int64, "I32": torch.int32, **TORCH_DTYPES}

#: (layer, pipeline, expert, tensor, name, dtype, values): one bin tensor of a rank, by its layer in the model.
Bin = tuple[int, int, int, int, str, str, list[float]]


def read_bins(directory: Path, catalog: TorchCatalog, shards: Iterable[Shard]) -> list[Bin]:
    """Read the capacity bins of the shards that this rank answers for."""
    ranks = {f"{rank_directory(catalog.grid, rank)}/{SHARD_FILE}": rank for rank in grid_ranks(catalog.grid)}
    first_layer = {(chunk.pipeline, chunk.virtual): chunk.first_layer for chunk in catalog.chunks}
    found: list[Bin] = []
    for shard in shards:
        rank = ranks[shard.file]
        for virtual, chunk in enumerate(shard.chunks):
            for stored_name, tensor in chunk.items():
                prefix, _, name = normalise(stored_name).partition(CAPACITY_BINS)
                layer = layer_of(prefix)
                if name and layer is not None:
                    place = first_layer[rank.pipeline, virtual] + layer, rank.pipeline, rank.expert, rank.tensor, name
                    found.append((*place, tensor.dtype, _read(directory, tensor, "--save-capacity-bins")))
    return found


#: A bin has a value for each boundary of a histogram, and the file may hold fewer than its shape says.
_MOST_VALUES = 1 << 16


def _read(directory: Path, tensor: StoredTensor, flag: str) -> list[float]:
    path, span = directory / tensor.file, 1 + sum(map(mul, tensor.strides, (size - 1 for size in tensor.shape)))
    if tensor.dtype not in _DTYPES or not 0 < tensor.elements <= _MOST_VALUES or span > _MOST_VALUES:
        what, expected, found = "no capacity bins, or too many", f"1 to {_MOST_VALUES:,} values", str(tensor.elements)
        if tensor.dtype not in _DTYPES:
            what, expected, found = "capacity bins of an unexpected dtype", ", ".join(_DTYPES), tensor.dtype
        raise UnsupportedModel(what, path, expected, found, remedy=f"leave {flag} out", tensor=tensor.name)
    with opened_source(path) as file:
        file.seek(tensor.offset_bytes)
        data = bytearray(file.read(span * DTYPE_BYTES[tensor.dtype]))
    stored = torch.frombuffer(data, dtype=_DTYPES[tensor.dtype])
    values: list[float] = stored.as_strided(tensor.shape, tensor.strides).flatten().tolist()
    return values


def write_bins(target: Directory, grid: Grid, bins: Iterable[Bin]) -> None:
    """Write the bins of all ranks as `capacity_bins.pt`; slots without one are empty dicts."""
    nested: dict[str, Any] = {}
    for layer, pipeline, expert, tensor, name, dtype, values in bins:
        slots = nested.setdefault(name, {}).setdefault(layer, _empty_slots(grid))
        slots[pipeline][expert][tensor] = torch.tensor(values, dtype=_DTYPES[dtype])
    content = io.BytesIO()
    torch.save(nested, content)
    write_file(target, FILE, content.getvalue())


def _empty_slots(grid: Grid) -> dict[int, Mapping[int, dict[int, Any]]]:
    return {
        pipeline: {expert: {tensor: {} for tensor in range(grid.tensor)} for expert in range(grid.expert)}
        for pipeline in range(grid.pipeline)
    }


def load_bins(path: Path) -> list[Bin]:
    """The bins of a `capacity_bins.pt`.

    Raises:
        CheckpointNotFound: there is no such file.
        CorruptFile: it is not of the nesting that `write_bins` writes.
        UnsupportedModel: bins of another dtype.
    """
    if not path.is_file():
        raise CheckpointNotFound(f"no {FILE}", path, remedy="leave --load-capacity-bins out")
    with below(path.parent), opened_source(path, FILE) as file:
        container, saved = open_dict(file, FILE)
        try:
            tensors = {
                (layer, pipeline, expert, tensor, name): values
                for name, layers in saved.items()
                for layer, pipelines in layers.items()
                for pipeline, experts in pipelines.items()
                for expert, tensors in experts.items()
                for tensor, values in tensors.items()
                if isinstance(name, str) and isinstance(values, Tensor) and len(values.shape) == 1
            }
        except AttributeError as error:
            raise CorruptFile("damaged capacity bins", FILE, found=error) from error
        found: list[Bin] = []
        for place, values in tensors.items():
            [bin] = place_tensors({f"{place[-1]} of layer {place[0]}": values}, container).values()
            found.append((*place, bin.dtype, _read(path.parent, bin, "--load-capacity-bins")))
    if not found:
        expected = "vectors, by name, layer, pipeline, expert and tensor rank"
        raise CorruptFile("no capacity bins in the file", path, expected, remedy="leave --load-capacity-bins out")
    return found


def place_bins(
    bins: Sequence[Bin], grid: Grid, chunks: Sequence[Chunk]
) -> dict[tuple[str, int], dict[str, tuple[str, list[float]]]]:
    """The bins that each file holds: (file, virtual stage) -> name there -> dtype and values.

    Raises:
        UsageError: the bins are of another grid; each rank has its own, so they fit no other.
    """
    chunk_of = {layer: c for c in chunks for layer in range(c.first_layer, c.first_layer + c.layers)}
    stages = {chunk.pipeline for chunk in chunk_of.values()}
    wanted = {rank for rank in written_ranks(grid) if rank.pipeline in stages}
    held = {Rank(pipeline, tensor, expert) for _, pipeline, expert, tensor, *_ in bins}
    astray = {layer for layer, pipeline, *_ in bins if layer not in chunk_of or chunk_of[layer].pipeline != pipeline}
    if astray or held != wanted:
        raise UsageError(
            "the capacity bins are of another parallel grid",
            FILE,
            expected=f"bins of {counted(len(wanted), 'rank')} of {grid}",
            found=f"bins of {counted(len(held), 'rank')}, {counted(len(astray), 'layer')} on other stages",
            remedy="choose the grid that they were saved from, or leave --load-capacity-bins out",
        )
    found: dict[tuple[str, int], dict[str, tuple[str, list[float]]]] = {}
    for layer, pipeline, expert, tensor, name, dtype, values in sorted(bins):
        chunk, directory = chunk_of[layer], rank_directory(grid, Rank(pipeline, tensor, expert))
        of_file = found.setdefault((f"{directory}/{SHARD_FILE}", chunk.virtual), {})
        of_file[capacity_bin(layer - chunk.first_layer, name)] = dtype, values
    return found


def packed(dtype: str, values: Sequence[float]) -> bytes:
    """The bytes of a bin tensor."""
    data: bytes = torch.tensor(values, dtype=_DTYPES[dtype]).view(torch.uint8).numpy().tobytes()
    return data
