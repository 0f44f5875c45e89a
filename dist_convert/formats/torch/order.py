"""Does every rank directory hold the shard that its name says? Headers show of some that were copied twice or swapped.

A directory's name is all that tells a shard's place, and a copy under a wrong name converts into a wrong model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing

from dist_convert.errors import ConversionError, InconsistentShards, raise_together
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.open import TorchModel
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.buffers import make_buffer
from dist_convert.read.file_reader import FileReader
from dist_convert.records import DTYPE_BYTES, Box, StoredTensor, View, local_name

ACCEPT = "--accept-shard-order"
_SAMPLE_BYTES = 64 << 10


def check_order(model: TorchModel, catalog: TorchCatalog, world: World, *, accept: bool) -> None:
    """Refuse rank directories that hold another's shard.

    Args:
        model, catalog: whose headers are read.
        world: this rank.
        accept: the directories are right, whatever speaks against it.

    Raises:
        InconsistentShards: all of them together.
    """
    if not accept:
        raise_together([*_swapped(model, catalog), *_copied_twice(model, catalog, world)])


def _swapped(model: TorchModel, catalog: TorchCatalog) -> Iterator[ConversionError]:
    """Directories whose tensor rank is not that of the process that saved them.

    Megatron numbers tensor parallel ranks first, in every order of the others (docs/formats.md, "Rank directories").
    Tools write one rank into all shards, which says nothing.
    """
    ranks = {file: shard.args.get("rank") for file, shard in model.shards.items()}
    numbers = [rank for rank in ranks.values() if type(rank) is int and rank >= 0]
    if len(set(numbers)) < len(ranks):
        return
    for (_, tensor), files in sorted(catalog.files.dense.items()):
        for file in files:
            rank = int(ranks[file] or 0)
            if rank % catalog.grid.tensor != tensor:
                yield InconsistentShards(
                    "a rank directory holds the shard of another tensor parallel rank",
                    file=str(model.directory / file),
                    expected=f"tensor parallel rank {tensor}, as the directory's name says",
                    found=f"args.rank {rank}, which is tensor parallel rank {rank % catalog.grid.tensor}",
                    remedy="shards may have been swapped: copy them again from where they were saved; if the names are "
                    f"right, convert with {ACCEPT}",
                )


def _copied_twice(model: TorchModel, catalog: TorchCatalog, world: World) -> list[ConversionError]:
    """Files with the same matrices that should hold different ones, by the checksums of their records."""
    holds: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for kind, shards in (("dense", catalog.files.dense), ("experts", catalog.files.experts)):
        for shard, files in shards.items():
            for file in files:
                holds.setdefault(file, set()).add((kind, shard))
    first_of: dict[tuple[object, ...], str] = {}
    found = []
    for file in sorted(holds):
        signature = _signature(catalog.stored, file)
        twin = first_of.setdefault(signature, file) if signature else file
        if twin != file and holds[twin] != holds[file] and local_name(twin) != local_name(file):
            found.append((twin, file))
    varied = [_varies(model, catalog, file, world) for _, file in found]
    return [
        InconsistentShards(
            "two rank directories hold the same shard",
            file=str(model.directory / file),
            expected="matrices of its own",
            found=f"those of {model.directory / twin}, by the checksums of all of them",
            remedy="one of them was copied under the other's name: copy the right one again from where it was saved; "
            f"if layers or experts are meant to be alike, as in an upcycled model, convert with {ACCEPT}",
        )
        for (twin, file), is_varied in zip(found, varied, strict=True)
        if is_varied
    ]


def _matrices(stored: Mapping[tuple[str, int], Mapping[str, StoredTensor]], file: str) -> Iterator[StoredTensor]:
    virtual = 0
    while (file, virtual) in stored:
        yield from (tensor for tensor in stored[file, virtual].values() if len(tensor.shape) > 1)
        virtual += 1


def _signature(stored: Mapping[tuple[str, int], Mapping[str, StoredTensor]], file: str) -> tuple[object, ...]:
    """The checksums of a file's matrices, by name; nothing where one has none."""
    listed = [(tensor.name, tensor.checksum) for tensor in _matrices(stored, file)]
    return () if any(checksum is None for _, checksum in listed) else tuple(sorted(listed))


def _varies(model: TorchModel, catalog: TorchCatalog, file: str, world: World) -> bool:
    """Whether a file's first matrix has different values: matrices of one value are alike in every shard."""
    tensor = next(_matrices(catalog.stored, file))
    readers = [rank for rank, files in enumerate(model.found.visible) if file in files]
    answer = False
    if world.rank == readers[0]:
        elements = min(tensor.elements, _SAMPLE_BYTES // DTYPE_BYTES[tensor.dtype])
        view = View(file, tensor.name, tensor.dtype, tensor.offset_bytes, 1, elements, elements, 1)
        buffer = make_buffer(view.size_bytes)
        with closing(FileReader(model.directory, make_buffer(1), model.found.listing)) as reader:
            reader.read(view.window(Box(0, 0, 1, elements)), tensor.dtype, 0, buffer, 0)
        item = buffer.memory[: DTYPE_BYTES[tensor.dtype]].tobytes()
        answer = buffer.memory[: view.size_bytes].tobytes() != item * elements
    answers: list[bool] = gather_objects(world, answer)
    return answers[readers[0]]
