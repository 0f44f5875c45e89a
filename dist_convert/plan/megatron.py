"""The Megatron side of a plan, source or target: where each shard of each parameter of the tables is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from dist_convert import dialects
from dist_convert.dialects import ExpertNumber, Piece, Spelling
from dist_convert.errors import ConversionError, InconsistentShards, MissingTensor, UnsupportedModel, WrongShape
from dist_convert.layout import Chunk, Grid, ShardFiles, place_chunks
from dist_convert.models.architecture import Architecture
from dist_convert.models.schema import Entry, Family, Row, moves_of_layer
from dist_convert.plan.geometry import shard_count, shard_size
from dist_convert.read.megatron_shard import Shard
from dist_convert.records import StoredTensor, View


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter: a table row at one layer and expert, in `shards` different shards."""

    row: Row
    layer: int | None
    expert: int | None
    shards: int

    @property
    def name(self) -> str:
        """Canonical name with global numbers."""
        return self.row.megatron.format(layer=self.layer, expert=self.expert)


#: A shard's stored pieces in one file: the first row that each holds, and where it is.
Replica = tuple[tuple[int, View], ...]


@dataclass(frozen=True)
class MegatronSide:
    """A Megatron checkpoint as a plan needs it: grid, files, and each stored tensor by file, chunk and name."""

    architecture: Architecture
    family: Family
    grid: Grid
    chunks: tuple[Chunk, ...]
    files: ShardFiles
    tensors: Mapping[tuple[str, int], Mapping[str, StoredTensor]]
    permuted_experts: bool


def entries(family: Family, architecture: Architecture) -> Iterable[tuple[Entry, int | None, int | None]]:
    """All table entries that apply, with layer and expert numbers, in the order in which tensors are written."""
    for entry in family.before:
        yield entry, None, None
    for layer in range(architecture.layers):
        for entry, expert in moves_of_layer(family.layer, architecture.experts):
            if entry.applies_to(architecture):
                yield entry, layer, expert
    for entry in family.after:
        if entry.applies_to(architecture):
            yield entry, None, None


def parameters(side: MegatronSide) -> Iterable[Parameter]:
    """All Megatron parameters of the model."""
    for entry, layer, expert in entries(side.family, side.architecture):
        if isinstance(entry, Row):
            parallel = side.grid.tensor if expert is None else side.grid.expert_tensor
            yield Parameter(entry, layer, expert, shard_count(entry, parallel))


def megatron_side(
    shards: Mapping[str, Shard], architecture: Architecture, family: Family, grid: Grid, files: ShardFiles
) -> MegatronSide:
    """Lay the shards' headers out as one model.

    Raises:
        UnsupportedModel: the layers in the files are not those of the args.
    """
    tensors = {
        (shard.file, virtual): {dialects.normalise(name): tensor for name, tensor in chunk.items()}
        for shard in shards.values()
        for virtual, chunk in enumerate(shard.chunks)
    }
    first_file = {pipeline: stage[0] for (pipeline, tensor), stage in files.dense.items() if tensor == 0}
    layers_of = {
        (pipeline, virtual): count_layers(tensors[file, virtual])
        for pipeline, file in first_file.items()
        for virtual in range(grid.virtual_pipeline)
    }
    found = sum(layers_of.values())
    if found != architecture.layers:
        raise UnsupportedModel(
            "the files hold another number of layers than the args say",
            expected=f"num_layers={architecture.layers}",
            found=f"{found}: " + ", ".join(f"stage {p} model{v}: {n}" for (p, v), n in layers_of.items()),
            remedy="a pipeline stage is incomplete or of another run",
        )
    chunks = place_chunks(grid, layers_of)
    side = MegatronSide(architecture, family, grid, chunks, files, tensors, permuted_experts=False)
    args = next(iter(shards.values())).args
    return replace(side, permuted_experts=_experts_are_permuted(side, bool(args.get("moe_permuted_weights"))))


def count_layers(names: Iterable[str]) -> int:
    """Layers in one chunk, from the normalised names of its tensors."""
    return max((layer + 1 for name in names if (layer := dialects.layer_of(name)) is not None), default=0)


def _experts_are_permuted(side: MegatronSide, flag: bool) -> bool:
    """Whether Habana's dynamic experts are stored as rows x columns: by the shape of any that is not square."""
    for parameter in parameters(side):
        if parameter.expert is not None:
            for file in _files(side, parameter, 0):
                fitting = list(_fitting(side, parameter, file))
                if len(fitting) == 1 and fitting[0].dialect.startswith("habana-dynamic"):
                    return "transposed" not in fitting[0].dialect
            if parameter.expert:
                break  # the first expert's two matrices have been seen
    return flag


def _files(side: MegatronSide, parameter: Parameter, shard: int) -> tuple[str, ...]:
    """The files that hold equal copies of one shard of a parameter."""
    pipeline = _chunk(side, parameter).pipeline
    if parameter.expert is not None:
        rank = parameter.expert // (side.architecture.experts // side.grid.expert)
        return side.files.experts[pipeline, rank, shard]
    if parameter.row.split == "replicated":
        return tuple(file for tensor in range(side.grid.tensor) for file in side.files.dense[pipeline, tensor])
    return side.files.dense[pipeline, shard]


def _chunk(side: MegatronSide, parameter: Parameter) -> Chunk:
    """The virtual pipeline stage that holds a parameter."""
    if parameter.layer is not None:
        layer = parameter.layer
        return next(c for c in side.chunks if c.first_layer <= layer < c.first_layer + c.layers)
    # An explicit layout may put embedding and head on any stage, so their names are looked for.
    holders = [c for c in side.chunks if parameter.name in side.tensors[side.files.dense[c.pipeline, 0][0], c.virtual]]
    outermost = 0 if parameter.row in side.family.before else -1
    return (holders or side.chunks)[outermost]


def _spellings(side: MegatronSide, parameter: Parameter) -> tuple[Spelling, ...]:
    chunk = _chunk(side, parameter)
    layer = None if parameter.layer is None else parameter.layer - chunk.first_layer
    number = None
    if parameter.expert is not None:
        per_rank = side.architecture.experts // side.grid.expert
        number = ExpertNumber(parameter.expert, parameter.expert % per_rank, per_rank)
    return dialects.spellings(parameter.row.megatron, layer, number)


def _views(side: MegatronSide, parameter: Parameter, file: str, spelling: Spelling) -> Replica | None:
    rows, columns = shard_size(parameter.row, side.architecture.sizes(), parameter.shards)
    stored = side.tensors[file, _chunk(side, parameter).virtual]
    found = []
    for piece in spelling.pieces:
        piece_rows = rows // piece.parts
        tensor = stored.get(piece.name)
        seen = dialects.view(piece, tensor, piece_rows, columns) if tensor else None
        if seen is None:
            return None
        found.append((piece.part * piece_rows, seen))
    return tuple(found)


def _fitting(side: MegatronSide, parameter: Parameter, file: str) -> dict[Spelling, Replica]:
    """The spellings whose pieces a file stores in fitting shapes, and where."""
    found = ((spelling, _views(side, parameter, file, spelling)) for spelling in _spellings(side, parameter))
    return {spelling: views for spelling, views in found if views is not None}


def replicas(side: MegatronSide, parameter: Parameter, shard: int) -> tuple[Replica, ...]:
    """Where one shard of a parameter is stored, once for every file that has it.

    Raises:
        MissingTensor, WrongShape: naming the tensor and the file.
    """
    found = []
    for file in _files(side, parameter, shard):
        fitting = _fitting(side, parameter, file)
        spelling = dialects.choose(fitting, permuted=side.permuted_experts)
        if spelling is None:
            raise _not_found(side, parameter, file)
        found.append(fitting[spelling])
    return tuple(found)


def stored_as(side: MegatronSide, parameter: Parameter, shard: int) -> set[tuple[str, str]]:
    """(file, tensor) of everything that any spelling of a shard names, whether it fits or not."""
    virtual = _chunk(side, parameter).virtual
    names = [piece.name for spelling in _spellings(side, parameter) for piece in spelling.pieces]
    return {
        (file, side.tensors[file, virtual][name].name)
        for file in _files(side, parameter, shard)
        for name in names
        if name in side.tensors[file, virtual]
    }


def tied_replicas(side: MegatronSide, parameter: Parameter, shard: int) -> tuple[Replica, ...]:
    """The copies of the embedding's shard that the last pipeline stage holds where both are tied and apart."""
    original, copy = dialects.TIED
    last = side.chunks[-1]
    if parameter.name != original or not side.architecture.tied or last == side.chunks[0]:
        return ()
    rows, columns = shard_size(parameter.row, side.architecture.sizes(), parameter.shards)
    found = []
    for file in side.files.dense[last.pipeline, shard]:
        stored = side.tensors[file, last.virtual].get(copy)
        seen = dialects.view(Piece(copy), stored, rows, columns) if stored else None
        if seen is not None:
            found.append(((0, seen),))
    return tuple(found)


def _not_found(side: MegatronSide, parameter: Parameter, file: str) -> ConversionError:
    stored = side.tensors[file, _chunk(side, parameter).virtual]
    spelled = _spellings(side, parameter)
    present = [stored[piece.name] for s in spelled for piece in s.pieces if piece.name in stored]
    rows, columns = shard_size(parameter.row, side.architecture.sizes(), parameter.shards)
    shape = [rows] if columns == 1 else [rows, columns]
    if not present:
        return MissingTensor(
            f"no tensor for {parameter.name}",
            tensor=spelled[0].pieces[0].name,
            file=file,
            expected=f"shape {shape}, under one of {', '.join(dict.fromkeys(s.pieces[0].name for s in spelled))}",
            found="nothing",
            remedy="the shard is incomplete or of another model; copy it again",
        )
    if len({tensor.name for tensor in present}) > 1 and len(_fitting(side, parameter, file)) > 1:
        return InconsistentShards(
            f"{parameter.name} is stored twice", file=file, found=", ".join(sorted({t.name for t in present}))
        )
    remedy = "the shard is of another model, or the args are not those it was trained with"
    if parameter.expert is not None and side.grid.expert_tensor < side.grid.tensor:
        remedy += "; if Habana's converter imported this checkpoint, add --habana-imported-experts"
    return WrongShape(
        f"wrong shape for {parameter.name}",
        tensor=present[0].name,
        file=file,
        expected=f"{shape} from the args and {side.grid}",
        found=f"{list(present[0].shape)}",
        remedy=remedy,
    )
