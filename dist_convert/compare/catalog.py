"""A checkpoint of any format as a verification sees it: its catalog, and who can read its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_convert.models.catalog import Catalog, Region, TensorMeta
from dist_convert.models.schema import Architecture


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to be compared.

    Attributes:
        path: the directory of its files, as this rank sees it.
        kind: for people: "Hugging Face", or "Megatron" with its grid and iteration.
        says_vocab: whether the checkpoint itself tells the size of its vocabulary without padding.
        catalog: of its tensors.
        visible: for each rank, the files that it can read.
        is_at_places: whether files are named by `records.name_at`, as different nodes have one of a name.
    """

    path: Path
    kind: str
    says_vocab: bool
    catalog: Catalog
    visible: tuple[frozenset[str], ...]
    is_at_places: bool = False

    @property
    def architecture(self) -> Architecture:
        return self.catalog.architecture

    @property
    def tensors(self) -> Mapping[str, TensorMeta]:
        return self.catalog.tensors

    def regions(self, name: str) -> Sequence[Region]:
        """See `Catalog`."""
        return self.catalog.regions(name)

    @property
    def padding_rows(self) -> int:
        """Of all tensors with a vocabulary; no part of the model."""
        return sum(region.box.rows for name in self.tensors for region in self.catalog.padding(name))
