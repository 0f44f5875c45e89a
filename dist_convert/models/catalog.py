"""What a checkpoint of any format is: logical tensors, and for each the boxes of it that lie somewhere.

Logical tensors are the smallest units (query, key and value apart; one for each layer and expert), named as in the
published layout of Hugging Face with one entry for each expert. A format says of each box of a tensor where it is
stored, and which places hold equal replicas. A conversion is the intersection of two such catalogs (`plan.copies`), a
verification their comparison.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from dist_convert.models.schema import Architecture
from dist_convert.options import HUGGINGFACE, Options
from dist_convert.records import Box, JsonObject, View, intersect

#: The flag that names an iteration, in most commands.
NAME_FLAG = "--ckpt-dir-name"
NOTHING_ASKED = Options(HUGGINGFACE)


@dataclass(frozen=True)
class Where:
    """A checkpoint to be opened: its path, and how it is to be read.

    Attributes:
        path: a Megatron checkpoint's root or iteration, or a Hugging Face directory.
        asked: the options, of which those of a source count.
        like: the config.json that they name, of such a model, which tells what its args do not.
        family: that it may be of, where its args do not tell.
        carried: a config.json that lies beside it, of the model that it was made from.
        is_compared: it is held against another: its copies may differ, and what its args leave open needs no answer.
        name_flag: that names the iteration, for messages.
    """

    path: Path
    asked: Options = NOTHING_ASKED
    like: JsonObject | None = None
    family: str | None = None
    carried: JsonObject | None = None
    is_compared: bool = False
    name_flag: str = NAME_FLAG


#: What of a checkpoint is not part of the model, or is dropped on purpose: (reason, tensors, bytes).
LeftBehind = tuple[tuple[str, int, int], ...]


def by_reason(left: Iterable[tuple[str, int, int]]) -> LeftBehind:
    """The same with one entry for each reason."""
    counts, sizes_bytes = Counter[str](), Counter[str]()
    for reason, count, size_bytes in left:
        counts[reason] += count
        sizes_bytes[reason] += size_bytes
    return tuple((reason, counts[reason], sizes_bytes[reason]) for reason in sorted(counts))


@dataclass(frozen=True)
class TensorMeta:
    """A logical tensor: elements per dimension (one or two), and the safetensors name of the dtype it is stored in.

    `own_dtype` is the one that it has in every target, whatever the others have.
    """

    shape: tuple[int, ...]
    dtype: str
    own_dtype: str = ""

    def dtype_in(self, target_dtype: str | None, main_dtype: str) -> str:
        """The dtype in a target for which most of the model is cast from the main dtype to another, or not."""
        return self.own_dtype or (target_dtype if target_dtype and self.dtype == main_dtype else self.dtype)

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[1] if len(self.shape) == 2 else 1

    @property
    def box(self) -> Box:
        """All of it."""
        return Box(0, 0, self.rows, self.columns)


@dataclass(frozen=True)
class Region:
    """A box of a logical tensor and every place that holds it; without places it is all zeros, which no file holds.

    `add` is what is added to the stored values to get the tensor's: 1 for norms that are stored as gamma - 1.
    """

    box: Box
    replicas: tuple[View, ...]
    add: int = 0

    def window(self, box: Box) -> tuple[View, ...]:
        """What each replica has of a box of the tensor that lies inside the region."""
        inside = Box(box.row - self.box.row, box.column - self.box.column, box.rows, box.columns)
        return tuple(view.window(inside) for view in self.replicas)


def cut(regions: Sequence[Region], box: Box) -> tuple[Region, ...]:
    """The regions that lie in a box, and of each what lies in it."""
    pairs = ((region, intersect(region.box, box)) for region in regions)
    return tuple(Region(inside, region.window(inside), region.add) for region, inside in pairs if inside)


def from_neighbours(stored: Iterable[Region], head_dim: int) -> tuple[Region, ...]:
    """Regions of heads in Meta's order, as regions of the tensor in the order of transformers, by row.

    Transformers and Megatron rotate row j of a head of d rows with row j + d/2, Meta's code row 2j with 2j + 1: row j
    of the first half is row 2j of Meta's, of the second half row 2j + 1. `stored` may begin and end inside of a head.
    """
    found = []
    for region in stored:
        box = region.box
        for head in range(box.row - box.row % head_dim, box.row_end, head_dim):
            start, end = max(head, box.row), min(head + head_dim, box.row_end)
            for half in (0, 1):
                row = start + (start - head + half) % 2
                rows = (end - row + 1) // 2
                if rows:
                    inside = region.window(Box(row, box.column, end - row, box.columns))
                    views = tuple(replace(view, rows=rows, row_stride=2 * view.row_stride) for view in inside)
                    first = head + half * head_dim // 2 + (row - head) // 2
                    found.append(Region(Box(first, box.column, rows, box.columns), views, region.add))
    return tuple(sorted(found, key=lambda region: (region.box.row, region.box.column)))


class Catalog(Protocol):
    """The logical tensors of a checkpoint, to be read or to be written."""

    @property
    def architecture(self) -> Architecture: ...

    @property
    def tensors(self) -> Mapping[str, TensorMeta]:
        """Every tensor by its name, in the order of the family's table."""

    @property
    def title(self) -> str:
        """The model, and how it is cut, for people."""

    @property
    def params_dtype(self) -> str:
        """The safetensors name of the dtype in which most of it is stored."""

    @property
    def is_owned(self) -> bool:
        """Whether its files are shards, each with an owner that reads or writes it, and not anyone's as the others."""

    def regions(self, name: str) -> Sequence[Region]:
        """The regions of a tensor, in the order of its rows; they cover it once. Made on request and never kept."""

    def padding(self, name: str) -> Sequence[Region]:
        """What is stored behind the tensor's last row, such as padding of the vocabulary."""
