"""Opens checkpoints of any format for a verification, from the headers of their files.

Files of one name on the disks of several nodes are each a copy of its own, and compared where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dist_convert.compare.catalog import Checkpoint
from dist_convert.compare.elements import check_elements
from dist_convert.errors import ConversionError
from dist_convert.formats.format import Model
from dist_convert.formats.open import open_checkpoint
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.open import TorchModel
from dist_convert.models.catalog import Catalog, Region, TensorMeta, Where
from dist_convert.models.schema import Architecture
from dist_convert.ranks.collectives import World
from dist_convert.read.discover import gather_listings
from dist_convert.read.source import stamp
from dist_convert.records import View, name_at


def open_named(letter: str, where: Where, world: World) -> Model:
    """Read the headers of a checkpoint; errors say which of the two it is.

    Raises:
        SourceError: all that the headers show to be wrong.
    """
    try:
        return open_checkpoint(where, world)
    except ConversionError as error:
        error.what = f"{letter} ({where.path}): {error.what}"
        raise


def checkpoints(
    first: Model,
    second: Model,
    world: World,
    *,
    is_shared: bool = False,
) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints; one that does not say the size of its vocabulary takes the other's.

    Args:
        first, second: of `open_named`.
        world: this rank.
        is_shared: whether all ranks are known to see the same files of the second.

    Raises:
        SourceError: tensors that are missing, unknown or of another shape than the config says.
    """
    found = []
    for letter, mine, other in (("A", first, second), ("B", second, first)):
        try:
            checkpoint = _checkpoint(mine, other.vocab, world)
        except ConversionError as error:
            error.what = f"{letter}: {error.what}"
            raise
        found.append(checkpoint if is_shared and letter == "B" else with_every_copy(checkpoint, world))
    return found[0], found[1]


def _checkpoint(model: Model, vocab: int | None, world: World) -> Checkpoint:
    catalog, _ = model.catalog(vocab, with_tied_copies=True)
    kind = "Hugging Face"
    if isinstance(model, TorchModel) and isinstance(catalog, TorchCatalog):
        check_elements(catalog, list(catalog.tensors)[world.rank :: world.size])
        iteration = model.shards[min(model.shards)].iteration
        kind = f"Megatron {catalog.grid}" + ("" if iteration is None else f", iteration {iteration}")
    return Checkpoint(model.directory, kind, model.vocab is not None, catalog, model.found.visible)


@dataclass(frozen=True)
class _EveryCopy:
    """A catalog in which each of several different files of one name is a replica.

    Attributes:
        catalog: as the files' names describe it.
        counts: how many different files there are of each name.
    """

    catalog: Catalog
    counts: Mapping[str, int]

    @property
    def architecture(self) -> Architecture:
        return self.catalog.architecture

    @property
    def title(self) -> str:
        return self.catalog.title

    @property
    def params_dtype(self) -> str:
        return self.catalog.params_dtype

    @property
    def kept_dtypes(self) -> Mapping[str, str]:
        return self.catalog.kept_dtypes

    @property
    def tensors(self) -> Mapping[str, TensorMeta]:
        return self.catalog.tensors

    @property
    def is_owned(self) -> bool:
        return self.catalog.is_owned

    def regions(self, name: str) -> Sequence[Region]:
        return self._every(self.catalog.regions(name))

    def padding(self, name: str) -> Sequence[Region]:
        return self._every(self.catalog.padding(name))

    def _every(self, regions: Sequence[Region]) -> Sequence[Region]:
        return [replace(r, replicas=tuple(copy for view in r.replicas for copy in self._copies(view))) for r in regions]

    def _copies(self, view: View) -> list[View]:
        return [replace(view, file=name_at(number, view.file)) for number in range(self.counts[view.file])]


def with_every_copy(checkpoint: Checkpoint, world: World) -> Checkpoint:
    """The checkpoint with a copy for each different file of one name, under `name_at` a number of its own.

    Args:
        checkpoint: as its files' names describe it.
        world: this rank.
    """
    seen = sorted(checkpoint.visible[world.rank])
    listings = gather_listings(world, {file: stamp(checkpoint.path / file) for file in seen})
    copies: dict[str, list[tuple[int, ...]]] = {}
    for listing in listings:
        for file, found in listing.items():
            known = copies.setdefault(file, [])
            if tuple(found) not in known:
                known.append(tuple(found))
    if all(len(known) == 1 for known in copies.values()):
        return checkpoint
    visible = tuple(
        frozenset(name_at(copies[file].index(tuple(found)), file) for file, found in listing.items())
        for listing in listings
    )
    every = _EveryCopy(checkpoint.catalog, {file: len(known) for file, known in copies.items()})
    return replace(checkpoint, catalog=every, visible=visible, is_at_places=True)
