"""Habana's capacity bins: small tuning statistics, kept for a later conversion back to the same grid.

They are written as `capacity_bins.pt` in the nesting that Habana's converter uses,
`{name: {global layer: {pipeline: {expert: {tensor: tensor}}}}}` (docs/formats.md, "Capacity bins").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dist_convert.dialects import CAPACITY_BINS, layer_of, normalise
from dist_convert.layout import Rank, rank_directory
from dist_convert.plan.source import MegatronSide
from dist_convert.read.megatron_shard import Shard
from dist_convert.records import DTYPE_BYTES, StoredTensor

FILE = "capacity_bins.pt"
_DTYPES = {"I64": torch.int64, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64}

#: (file, virtual stage, local layer, name, dtype, values): one bin tensor, as it travels between ranks.
Bin = tuple[str, int, int, str, str, list[float]]


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
    size_bytes = tensor.elements * DTYPE_BYTES[tensor.dtype]
    with (directory / tensor.file).open("rb") as file:
        file.seek(tensor.offset_bytes)
        data = bytearray(file.read(size_bytes))
    values: list[float] = torch.frombuffer(data, dtype=_DTYPES[tensor.dtype]).tolist()
    return values


def write_bins(target: Path, side: MegatronSide, bins: Iterable[Bin]) -> None:
    """Write the bins of all ranks as `capacity_bins.pt`; slots without one are empty dicts."""
    places = dict(_places(side))
    first_layer = {(chunk.pipeline, chunk.virtual): chunk.first_layer for chunk in side.chunks}
    nested: dict[str, Any] = {}
    for file, virtual, local_layer, name, dtype, values in bins:
        rank = places[file]
        layer = first_layer[rank.pipeline, virtual] + local_layer
        slots = nested.setdefault(name, {}).setdefault(layer, _empty_slots(side))
        slots[rank.pipeline][rank.expert][rank.tensor] = torch.tensor(values, dtype=_DTYPES[dtype])
    torch.save(nested, target / FILE)


def _places(side: MegatronSide) -> Iterator[tuple[str, Rank]]:
    for (pipeline, tensor), files in side.files.dense.items():
        for expert in range(side.grid.expert):
            rank = Rank(pipeline, tensor, expert)
            yield from ((file, rank) for file in files if file.startswith(rank_directory(side.grid, rank) + "/"))


def _empty_slots(side: MegatronSide) -> dict[int, Mapping[int, dict[int, Any]]]:
    grid = side.grid
    return {
        pipeline: {expert: {tensor: {} for tensor in range(grid.tensor)} for expert in range(grid.expert)}
        for pipeline in range(grid.pipeline)
    }
