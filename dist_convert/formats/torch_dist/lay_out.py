"""The files of a `torch_dist` target before any data: which boxes of which tensors, in which blobs.

They follow from the target's grid alone: the boxes are those that training at this grid would save, and there is a file
for each of its model parallel ranks. Loading reads whole chunks, so that chunks cut like this cost it least.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dist_convert.errors import PlanError, UnsupportedModel
from dist_convert.formats.megatron.grid import Grid, written_ranks
from dist_convert.formats.megatron.names import with_mtp_name
from dist_convert.formats.megatron.parameters import Parameter, parameters_of
from dist_convert.formats.megatron.target import MegatronTarget
from dist_convert.formats.saved import Pieces, SavedTensor, lay_out_container, pickled
from dist_convert.formats.torch_dist.catalog import StoredChunk, chunk_name, leading_axes
from dist_convert.formats.torch_dist.names import extra_states, target_key
from dist_convert.models import FAMILIES
from dist_convert.models.schema import Architecture, part_size
from dist_convert.read.dcp import SUFFIX, Blob
from dist_convert.records import Box, StoredTensor, TargetFile

#: Chunks of this size begin on a page, as direct reads and writes of them want it.
_LARGE_BYTES, _PAGE_BYTES = 1 << 20, 4096
_CENTRAL_HEADER, _CENTRAL_CRC, _CENTRAL_NAME = b"PK\x01\x02", 16, 46
_DESCRIPTOR, _DESCRIPTOR_CRC = b"PK\x07\x08", 4


@dataclass(frozen=True)
class Template:
    """A blob that begins at byte 0: all of it that is no value, and where values and their checksum go, in bytes.

    `checksums` is empty for an object, which has no values.
    """

    pieces: Pieces
    size_bytes: int
    data_offset_bytes: int
    data_bytes: int
    checksums: tuple[int, ...]


@dataclass(frozen=True)
class PlannedBlob:
    """A box of a tensor, or an empty object, whose dtype is "" and whose box nothing."""

    key: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Blob


@dataclass(frozen=True)
class PlannedFiles:
    """All files.

    Attributes:
        sizes_bytes: of each file.
        blobs: of each file, in its order.
        shapes: of each tensor, by its key.
        templates: by dtype and sizes.
    """

    sizes_bytes: Mapping[str, int]
    blobs: Mapping[str, Sequence[PlannedBlob]]
    shapes: Mapping[str, tuple[int, ...]]
    templates: Mapping[tuple[str, tuple[int, ...]], Template]


def _chunk_template(dtype: str, sizes: tuple[int, ...]) -> Template:
    """What `torch.save` makes of a contiguous tensor."""
    tensor = SavedTensor(0, dtype, sizes)
    pieces, size_bytes, [data_offset_bytes] = lay_out_container(pickled(tensor), [tensor.size_bytes])
    end_bytes = data_offset_bytes + tensor.size_bytes
    start, tail = pieces[-1]
    central = tail.rfind(b"archive/data/0") - _CENTRAL_NAME
    descriptor = end_bytes - start
    found = tail[descriptor : descriptor + 4], tail[central : central + 4]
    if found != (_DESCRIPTOR, _CENTRAL_HEADER):
        expected = (_DESCRIPTOR, _CENTRAL_HEADER)
        raise PlanError("torch lays out a saved tensor in another way", expected=expected, found=found)
    checksums = (end_bytes + _DESCRIPTOR_CRC, start + central + _CENTRAL_CRC)
    return Template(pieces, size_bytes, data_offset_bytes, tensor.size_bytes, checksums)


def _object_template() -> Template:
    """What `torch.save` makes of the empty state that modules without state have."""
    pieces, size_bytes, _ = lay_out_container(pickled([None]), [])
    return Template(pieces, size_bytes, 0, 0, ())


def lay_out_files(target: MegatronTarget) -> PlannedFiles:
    """Place every chunk and object of a target.

    Raises:
        UnsupportedModel: layers or experts of different dtypes.
    """
    architecture, grid, norms = target.architecture, target.grid, target.dialect.norms
    holders = _holders(grid)
    templates: dict[tuple[str, tuple[int, ...]], Template] = {("", ()): _object_template()}
    ends_bytes = {file: 0 for files in holders.values() for file in files}
    blobs: dict[str, list[PlannedBlob]] = {file: [] for file in ends_bytes}
    for key, layer, expert in extra_states(architecture, norms=norms):
        files = holders[_stage(target, layer, is_before=False), _rank_of(expert, architecture, grid), 0]
        place = _place(ends_bytes, files[0], templates["", ()])
        blobs[files[0]].append(PlannedBlob(with_mtp_name(key, target.dialect.mtp), "", (), (), place))
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for number, parameter in enumerate(parameters_of(architecture, grid)):
        row, layer, expert = parameter.row, parameter.layer, parameter.expert
        piece = target_key(row, layer, expert, architecture, norms=norms)
        piece = replace(piece, key=with_mtp_name(piece.key, target.dialect.mtp))
        stage = _stage(target, layer, is_before=row in FAMILIES[architecture.family].before)
        expert_rank = _rank_of(expert, architecture, grid)
        axes = leading_axes(parameter, architecture, len(piece.index))
        dimensions = len(row.parts[0].dims)
        rows, columns = replace(parameter, shards=1).shard_size(architecture)
        shapes[piece.key] = (*axes, *(rows, columns)[:dimensions])
        dtype = target.dtypes[parameter.name]
        if (first := dtypes.setdefault(piece.key, dtype)) != dtype:
            raise UnsupportedModel(
                "layers or experts of one torch_dist tensor need one dtype",
                tensor=parameter.name,
                file=piece.key,
                expected=f"{first}, as in the layers before",
                found=dtype,
                remedy="save the model in one dtype, or convert it with --to torch",
            )
        for shard, box in _boxes(parameter, rows, columns, architecture):
            files = holders[stage, expert_rank, shard]
            # Dense chunks go round the files of a stage's expert parallel ranks, which all hold them.
            file = files[0] if expert_rank is not None else files[number % len(files)]
            offsets = (*piece.index, *(box.row, box.column)[:dimensions])
            sizes = (*(1 for _ in axes), *(box.rows, box.columns)[:dimensions])
            if (dtype, sizes) not in templates:
                templates[dtype, sizes] = _chunk_template(dtype, sizes)
            place = _place(ends_bytes, file, templates[dtype, sizes])
            blobs[file].append(PlannedBlob(piece.key, dtype, offsets, sizes, place))
    return PlannedFiles(ends_bytes, blobs, shapes, templates)


def _holders(grid: Grid) -> dict[tuple[int, int | None, int], tuple[str, ...]]:
    """(pipeline, expert or None for dense parameters, shard) -> the files of the ranks that hold it in training."""
    holders: dict[tuple[int, int | None, int], tuple[str, ...]] = {}
    for rank in written_ranks(grid):
        number = (rank.pipeline * grid.expert + rank.expert) * grid.tensor + rank.tensor
        file = f"__{number}_0{SUFFIX}"
        for held in (
            (rank.pipeline, None, rank.tensor),
            (rank.pipeline, rank.expert, rank.tensor % grid.expert_tensor),
        ):
            holders[held] = (*holders.get(held, ()), file)
    return holders


def _stage(target: MegatronTarget, layer: int | None, *, is_before: bool) -> int:
    """The pipeline rank of a layer, of what comes before all layers, or of what comes after them."""
    if layer is None:
        return target.chunks[0 if is_before else -1].pipeline
    return next(c.pipeline for c in target.chunks if c.first_layer <= layer < c.first_layer + c.layers)


def _rank_of(expert: int | None, architecture: Architecture, grid: Grid) -> int | None:
    """The expert parallel rank of an expert."""
    return None if expert is None else expert // (architecture.experts // grid.expert)


def _boxes(parameter: Parameter, rows: int, columns: int, architecture: Architecture) -> Iterator[tuple[int, Box]]:
    """The shards' boxes of a whole parameter of `rows` x `columns`: of tensors stacked in it, a box of each."""
    row, shards = parameter.row, parameter.shards
    if row.split == "replicated":
        yield 0, Box(0, 0, rows, columns)
    elif row.split == "columns":
        width = columns // shards
        yield from ((shard, Box(0, shard * width, rows, width)) for shard in range(shards))
    else:
        sizes = architecture.sizes()
        stacked = [rows] if row.by_query_group or len(row.parts) == 1 else [part_size(p, sizes)[0] for p in row.parts]
        first = 0
        for part_rows in stacked:
            height = part_rows // shards
            yield from ((shard, Box(first + shard * height, 0, height, columns)) for shard in range(shards))
            first += part_rows


def _place(ends_bytes: dict[str, int], file: str, template: Template) -> Blob:
    """The next place in a file."""
    first_byte = ends_bytes[file]
    if template.data_bytes >= _LARGE_BYTES:
        first_byte += -(first_byte + template.data_offset_bytes) % _PAGE_BYTES
    ends_bytes[file] = first_byte + template.size_bytes
    return Blob(file, first_byte, template.size_bytes)


def target_file(files: PlannedFiles, name: str) -> TargetFile:
    """A file with the tensors that it will hold: its chunks."""
    tensors = []
    for blob in files.blobs[name]:
        if blob.dtype:
            at, label = stored_chunk(files, blob), chunk_name(blob.key, blob.offsets)
            tensors.append(StoredTensor(label, name, blob.dtype, blob.sizes, at.strides, at.offset_bytes))
    return TargetFile(name, b"", files.sizes_bytes[name], tuple(tensors))


def stored_chunk(files: PlannedFiles, chunk: PlannedBlob) -> StoredChunk:
    """Where the elements of a chunk will lie."""
    strides = [1]
    for size in chunk.sizes[:0:-1]:
        strides.insert(0, strides[0] * size)
    offset_bytes = chunk.place.offset_bytes + files.templates[chunk.dtype, chunk.sizes].data_offset_bytes
    return StoredChunk(chunk.offsets, chunk.sizes, chunk.place.file, offset_bytes, tuple(strides))
