"""A `torch_dist` checkpoint that is to be made: a `Target`, and its files before any data.

Which boxes of which tensors lie in which blobs follows from the target's grid alone: the boxes are those that training
at this grid would save, and there is a file for each of its model parallel ranks. Loading reads whole chunks, so that
chunks cut like this cost it least.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dist_convert.errors import UnsupportedModel, UsageError
from dist_convert.formats.dcp.files import PlannedFiles
from dist_convert.formats.megatron import grid as grids
from dist_convert.formats.megatron.geometry import CutRow
from dist_convert.formats.megatron.grid import Grid, layer_chunks, written_ranks
from dist_convert.formats.megatron.iterations import KIND_FILE
from dist_convert.formats.megatron.parameters import MegatronCatalog, parameters_of
from dist_convert.formats.megatron.target import MegatronTarget
from dist_convert.formats.pickles import pickled
from dist_convert.formats.saved import common_content, lay_out_container
from dist_convert.formats.torch_dist.catalog import leading_axes, open_catalog
from dist_convert.formats.torch_dist.contents import COMMON_FILE
from dist_convert.formats.torch_dist.names import extra_states, target_key
from dist_convert.models import FAMILIES
from dist_convert.models.schema import Architecture
from dist_convert.options import TORCH_DIST
from dist_convert.read.dcp import METADATA_FILE, SUFFIX
from dist_convert.records import Box, JsonObject, TargetFile
from dist_convert.write.checksums import KnownRanges
from dist_convert.write.files import Beside, Directory, make_file, write_file
from dist_convert.write.task import Target

#: As every version of Megatron-Core from 0.13 on reads it.
_KIND = {
    "sharded_backend": TORCH_DIST,
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class DistTarget(Target):
    """What is to be made, and its files before any data."""

    target: MegatronTarget
    files: PlannedFiles

    @property
    def settings(self) -> JsonObject:
        return self.target.fingerprint

    def make_files(self, partial: Directory, files: Sequence[TargetFile], *, is_first: bool) -> None:
        self.files.make(partial, files)

    def complete(self, partial: Directory, files: Sequence[TargetFile], known: KnownRanges, *, is_first: bool) -> None:
        """See `Target`: the checksums of all chunks; `.metadata` and the args."""
        self.files.write_checksums(partial, files, known)
        if not is_first:
            return
        content = common_content(self.target.args.values, self.target.settings.iteration or 0, COMMON_FILE)
        common = lay_out_container(pickled(content), [])
        make_file(partial, COMMON_FILE, common.pieces, common.size_bytes)
        self.target.write_carried(partial)
        write_file(partial, KIND_FILE, json.dumps(_KIND).encode())
        self.files.write_metadata(partial)

    def beside(self) -> Mapping[str, Beside]:
        return self.target.beside()


def lay_out_torch_dist(target: MegatronTarget) -> DistTarget:
    """The files of a target; a UsageError for experts that torch_dist has no keys for."""
    if target.architecture.experts and target.settings.dialect.experts == "habana-dynamic":
        what = "Habana's dynamic experts have no keys in torch_dist"
        expected = "--expert-layout sequential, te-grouped or grouped, which are saved alike"
        raise UsageError(what, expected=expected, found="habana-dynamic", remedy="give one of them, or --to torch")
    return DistTarget(target, lay_out_files(target))


def catalog_of_target(target: DistTarget) -> tuple[MegatronCatalog, tuple[TargetFile, ...]]:
    """The target as a catalog, and its files."""
    architecture, args = target.target.architecture, target.target.args.values
    return open_catalog(target.files.stored(), architecture, args, METADATA_FILE), target.files.target_files()


def lay_out_files(target: MegatronTarget) -> PlannedFiles:
    """Place every chunk and object of a target; an UnsupportedModel for layers or experts of different dtypes."""
    architecture, grid, norms = target.architecture, target.settings.grid, target.settings.dialect.norms
    # Ranks are numbered as in training, tensor parallel ones first.
    numbers = {r: (r.pipeline * grid.expert + r.expert) * grid.tensor + r.tensor for r in written_ranks(grid)}
    holders = grids.holders(grid, {rank: [f"__{number}_0{SUFFIX}"] for rank, number in numbers.items()})
    chunk_of_layer = layer_chunks(target.settings.chunks)
    every = [file for files in holders.values() for file in files]
    planned = PlannedFiles(dict.fromkeys(every, 0), {file: [] for file in every})
    for key, layer, expert in extra_states(architecture, norms=norms):
        stage = target.settings.chunks[-1].pipeline if layer is None else chunk_of_layer[layer].pipeline
        files = holders[stage, _rank_of(expert, architecture, grid), 0]
        planned.add(files[0], key)
    dtypes: dict[str, str] = {}
    boxes: dict[int, list[tuple[int, Box]]] = {}  # of each row, for all layers and experts
    for number, parameter in enumerate(parameters_of(architecture, grid)):
        row, layer, expert = parameter.row, parameter.layer, parameter.expert
        piece = target_key(row, layer, expert, architecture, norms=norms)
        outermost = target.settings.chunks[0 if row in FAMILIES[architecture.family].before else -1]
        stage = (outermost if layer is None else chunk_of_layer[layer]).pipeline
        expert_rank = _rank_of(expert, architecture, grid)
        axes = leading_axes(parameter, architecture, len(piece.index))
        dimensions = len(row.parts[0].dims)
        if id(parameter.cut) not in boxes:
            boxes[id(parameter.cut)] = list(_boxes(parameter.cut))
        listed = boxes[id(parameter.cut)]
        whole = listed[-1][1].row_end, listed[-1][1].column_end
        planned.shapes[piece.key] = (*axes, *whole[:dimensions])
        dtype = target.dtypes[parameter.name]
        if (first := dtypes.setdefault(piece.key, dtype)) != dtype:
            what = "layers or experts of one torch_dist tensor need one dtype"
            expected = f"{first}, as in the layers before"
            remedy = "save the model in one dtype, or convert it with --to torch"
            raise UnsupportedModel(what, piece.key, expected, tensor=parameter.name, found=dtype, remedy=remedy)
        for shard, box in listed:
            files = holders[stage, expert_rank, shard]
            # Dense chunks go round the files of a stage's expert parallel ranks, which all hold them.
            file = files[0] if expert_rank is not None else files[number % len(files)]
            offsets = (*piece.index, *(box.row, box.column)[:dimensions])
            sizes = (*(1 for _ in axes), *(box.rows, box.columns)[:dimensions])
            planned.add(file, piece.key, dtype, offsets, sizes)
    return planned


def _rank_of(expert: int | None, architecture: Architecture, grid: Grid) -> int | None:
    """The expert parallel rank of an expert."""
    return None if expert is None else expert // (architecture.experts // grid.expert)


def _boxes(cut: CutRow) -> Iterator[tuple[int, Box]]:
    """The shards' boxes of a whole parameter, in its order: of tensors stacked in it, a box of each."""
    row, shards, first = cut.row, cut.shards, 0
    if row.by_query_group or row.padded_rows:
        rows, columns = cut.shard_size
        yield from ((shard, Box(shard * rows, 0, rows, columns)) for shard in range(shards))
        return
    for boxes, part_rows in zip(cut.boxes, cut.part_rows, strict=True):
        yield from ((one.shard, replace(one.box, row=first + one.box.row)) for one in boxes)
        first += part_rows
