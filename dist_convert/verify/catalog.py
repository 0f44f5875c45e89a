"""A checkpoint of either kind as a verification sees it: named tensors, and every place that holds a box of them.

`plan.megatron` walks through the shards and says what they hold; here a tensor's own rows are walked through and
numbered, so that a mistake of either shows when a conversion is verified. Facts: docs/formats.md, "Attention and the
query-group interleave" and "MLP and the gate-up interleave".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_convert.models.schema import Architecture, Row
from dist_convert.plan.megatron import part_size, shard_size
from dist_convert.read.megatron import NAME_FLAG
from dist_convert.records import Box, View


@dataclass(frozen=True)
class Which:
    """A checkpoint to be opened: its path, and how it is to be read.

    Attributes:
        path: a Megatron checkpoint's root or iteration, or a Hugging Face directory.
        ckpt_dir_name: the iteration; None asks the tracker file.
        habana_imported_experts: its experts are those of Habana's importer, not interleaved over ranks.
        true_vocab_size: tokens without padding; None asks the args, then the tokenizer.
        tokenizer: its directory, where the args' own path is not here.
        is_shared: whether all ranks are known to see the same files.
        name_flag: that gives `ckpt_dir_name`, for messages.
    """

    path: Path
    ckpt_dir_name: str | None = None
    habana_imported_experts: bool = False
    true_vocab_size: int | None = None
    tokenizer: Path | None = None
    is_shared: bool = False
    name_flag: str = NAME_FLAG


@dataclass(frozen=True)
class Whole:
    """A tensor of a model under its Hugging Face name.

    Attributes:
        name: the canonical one, of the tables.
        shape: elements per dimension, one or two.
        dtype: safetensors name of what is stored.
        add: what is added to the stored values, 1 for norms that are stored as gamma - 1.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    add: int = 0

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[1] if len(self.shape) == 2 else 1


@dataclass(frozen=True)
class Region:
    """A box of a tensor and every place that holds it; without places it is all zeros, which no file holds."""

    box: Box
    copies: tuple[View, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of either kind.

    Attributes:
        path: the directory of its files, as this rank sees it.
        kind: for people: "Hugging Face", or "Megatron" with its grid and iteration.
        architecture: the model, by its config or args.
        says_vocab: whether the checkpoint itself tells the size of its vocabulary without padding.
        tensors: every tensor by its name, in the order of the tables.
        regions: gives the regions of a named tensor, which cover it once.
        padding_rows: of all tensors with a vocabulary; no part of the model.
        visible: for each rank, the files that it can read.
        is_at_places: whether files are named by `records.name_at`, as different nodes have one of a name.
    """

    path: Path
    kind: str
    architecture: Architecture
    says_vocab: bool
    tensors: Mapping[str, Whole]
    regions: Callable[[str], tuple[Region, ...]]
    padding_rows: int
    visible: tuple[frozenset[str], ...]
    is_at_places: bool = False


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose headers are read.

    Attributes:
        vocab: its vocabulary without padding; None where only the other checkpoint may tell.
        catalog: describes it, given the other checkpoint's `vocab`.
    """

    vocab: int | None
    catalog: Callable[[int | None], Checkpoint]


@dataclass(frozen=True)
class Place:
    """A box of a Hugging Face tensor, the shard that holds it, and the equal box of that shard."""

    box: Box
    shard: int
    inside: Box


def places(row: Row, part: int, sizes: Mapping[str, int], shards: int) -> Iterator[Place]:
    """Every place of one part of a parameter; their boxes cover the part once.

    Args:
        row: of the table.
        part: number of the Hugging Face tensor in the row's parts.
        sizes: see `Architecture.sizes`.
        shards: different shards of the parameter.
    """
    rows, columns = part_size(row.parts[part], sizes)
    shard_rows, shard_columns = shard_size(row, sizes, shards)
    if row.split != "rows":
        for shard in range(shards):
            box = Box(0, shard * shard_columns, rows, shard_columns)
            yield Place(box, shard, Box(0, 0, rows, shard_columns))
        return
    turns = {"shards": shards, "query_groups": sizes["query_groups"], "none": 1}[row.interleave]
    heights = [part_size(other, sizes)[0] // turns for other in row.parts]
    first = 0
    while first < rows:
        turn, within = divmod(first, heights[part])
        shard, at = divmod(turn * sum(heights) + sum(heights[:part]) + within, shard_rows)
        count = min(heights[part] - within, shard_rows - at)
        yield Place(Box(first, 0, count, columns), shard, Box(at, 0, count, columns))
        first += count
