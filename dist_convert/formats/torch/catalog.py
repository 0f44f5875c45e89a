"""A checkpoint of Megatron's `torch` format as a catalog: where each box of each tensor is stored, in which files.

It serves a source, from the headers of its files, and a target, from those that its files will have (`survey`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from dist_convert.errors import ConversionError, InconsistentShards, MissingTensor, WrongShape
from dist_convert.formats.megatron import names as megatron_names
from dist_convert.formats.megatron.grid import Chunk, Grid, ShardFiles, layer_chunks
from dist_convert.formats.megatron.names import Numbers, Piece, Spelling
from dist_convert.formats.megatron.parameters import MegatronCatalog, Parameter, Replica
from dist_convert.records import StoredTensor


@dataclass(frozen=True, kw_only=True)
class TorchCatalog(MegatronCatalog):
    """A `Catalog` of rank files.

    Attributes:
        grid: how the model is cut.
        chunks: which layers each virtual pipeline stage holds.
        files: which files hold which shard.
        stored: each tensor by file and virtual stage, then by its normalised name.
        permuted_experts: Habana's dynamic experts are stored as rows x columns.
        pinned: parameters whose copies differ; that of the lowest rank is taken.
        with_tied_copies: the last stage's copy of a tied embedding counts as a replica of the embedding.
    """

    grid: Grid
    chunks: tuple[Chunk, ...]
    files: ShardFiles
    stored: Mapping[tuple[str, int], Mapping[str, StoredTensor]]
    permuted_experts: bool = False
    pinned: frozenset[str] = frozenset()
    with_tied_copies: bool = False

    @cached_property
    def chunk_of_layer(self) -> tuple[Chunk, ...]:
        """For each layer, the virtual pipeline stage that holds it."""
        return layer_chunks(self.chunks)


def equal_replicas(catalog: TorchCatalog, parameter: Parameter, shard: int) -> tuple[Replica, ...]:
    """Where one shard of a parameter is stored, once for every file that has it, in the same pieces.

    Raises:
        MissingTensor, WrongShape: naming the tensor and the file.
        InconsistentShards: equal copies of a shard are stored in different pieces.
    """
    found = tuple(_chosen(catalog, parameter, file)[1] for file in files_of(catalog, parameter, shard))
    if parameter.name in catalog.pinned:
        return found[:1]
    if catalog.with_tied_copies:
        found += _tied_replicas(catalog, parameter, shard)
    if len(found) > 1 and len({tuple((row, view.rows) for row, _, view in replica) for replica in found}) > 1:
        raise InconsistentShards(
            "equal copies are stored in different layouts",
            ", ".join(replica[0][2].file for replica in found),
            tensor=parameter.name,
        )
    return found


def files_of(catalog: TorchCatalog, parameter: Parameter, shard: int) -> tuple[str, ...]:
    """The files that hold equal copies of one shard of a parameter."""
    pipeline = _chunk(catalog, parameter).pipeline
    if parameter.expert is not None:
        rank = parameter.expert // (catalog.architecture.experts // catalog.grid.expert)
        return catalog.files[pipeline, rank, shard]
    if parameter.row.split == "replicated":
        return tuple(file for rank in range(catalog.grid.tensor) for file in catalog.files[pipeline, None, rank])
    return catalog.files[pipeline, None, shard]


def _chunk(catalog: TorchCatalog, parameter: Parameter) -> Chunk:
    """The virtual pipeline stage that holds a parameter."""
    if parameter.layer is not None:
        return catalog.chunk_of_layer[parameter.layer]
    name = _OF_MTP if megatron_names.is_of_mtp(parameter.name) else parameter.name
    return (_holders(catalog, name) or catalog.chunks)[0 if parameter.row in catalog.family.before else -1]


#: What the stage holds that has the layers of multi-token prediction.
_OF_MTP = "mtp.layers.0.enorm.weight"


def _holders(catalog: TorchCatalog, name: str) -> list[Chunk]:
    """The virtual pipeline stages that store what belongs to no layer: a layout may put that on any of them."""
    return [c for c in catalog.chunks if name in catalog.stored[catalog.files[c.pipeline, None, 0][0], c.virtual]]


def _stored_and_numbers(
    catalog: TorchCatalog, parameter: Parameter, file: str
) -> tuple[Mapping[str, StoredTensor], Numbers]:
    """What the stage of a file holds that has a parameter, and the numbers in the parameter's names there."""
    chunk = _chunk(catalog, parameter)
    layer = None if parameter.layer is None else parameter.layer - chunk.first_layer
    per_rank = max(1, catalog.architecture.experts // catalog.grid.expert)
    numbers = Numbers(layer, parameter.expert, (parameter.expert or 0) % per_rank, per_rank)
    return catalog.stored[file, chunk.virtual], numbers


def fitting_spellings(catalog: TorchCatalog, parameter: Parameter, file: str) -> list[tuple[Spelling, Replica]]:
    """The spellings whose pieces a file stores in fitting shapes, and where."""
    stored, numbers = _stored_and_numbers(catalog, parameter, file)
    rows, columns = parameter.cut.shard_size
    found = []
    for spelling in parameter.cut.spellings:
        replica = []
        for piece in spelling.pieces:
            piece_rows, tensor = rows // piece.parts, stored.get(numbers.named(piece.name))
            view = megatron_names.view(piece, tensor, piece_rows, columns, numbers) if tensor else None
            if view is None:
                break
            replica.append((piece.part * piece_rows, 0, view))
        else:
            found.append((spelling, tuple(replica)))
    return found


def _chosen(catalog: TorchCatalog, parameter: Parameter, file: str) -> tuple[Spelling, Replica]:
    fitting = fitting_spellings(catalog, parameter, file)
    chosen = megatron_names.choose([spelling for spelling, _ in fitting], permuted=catalog.permuted_experts)
    for spelling, views in fitting:
        if spelling is chosen:
            return spelling, views
    raise _not_found(catalog, parameter, file)


def stored_pieces(catalog: TorchCatalog, parameter: Parameter, file: str) -> list[tuple[Piece, StoredTensor]]:
    """The stored tensors that hold a shard of a parameter in one file."""
    spelling, _ = _chosen(catalog, parameter, file)
    stored, numbers = _stored_and_numbers(catalog, parameter, file)
    return [(piece, stored[numbers.named(piece.name)]) for piece in spelling.pieces]


def stored_as(catalog: TorchCatalog, parameter: Parameter, file: str) -> list[StoredTensor]:
    """Everything in a file that any spelling of a parameter names, whether it fits or not."""
    stored, numbers = _stored_and_numbers(catalog, parameter, file)
    names = (numbers.named(piece.name) for spelling in parameter.cut.spellings for piece in spelling.pieces)
    return [stored[name] for name in names if name in stored]


def _tied_replicas(catalog: TorchCatalog, parameter: Parameter, shard: int) -> tuple[Replica, ...]:
    """The copies of the embedding's shard that another stage holds: the last one, or that of multi-token prediction."""
    name, holder = megatron_names.TIED[1], catalog.chunks[-1]
    if parameter.name != megatron_names.TIED[0]:
        return ()
    predicts = _holders(catalog, _OF_MTP) if catalog.architecture.fact("mtp_layers") else []
    if predicts and predicts[0] != catalog.chunks[0]:
        name, holder = parameter.name, predicts[0]  # multi-token prediction reads it
    elif not catalog.architecture.tied:
        return ()
    found = []
    for file in catalog.files[holder.pipeline, None, shard]:
        stored = catalog.stored[file, holder.virtual].get(name)
        seen = megatron_names.view(Piece(name), stored, *parameter.cut.shard_size, Numbers()) if stored else None
        if seen is not None:
            found.append(((0, 0, seen),))
    return tuple(found)


def _not_found(catalog: TorchCatalog, parameter: Parameter, file: str) -> ConversionError:
    present = stored_as(catalog, parameter, file)
    rows, columns = parameter.cut.shard_size
    shape = [rows] if columns == 1 else [rows, columns]
    if not present:
        _, numbers = _stored_and_numbers(catalog, parameter, file)
        spelled = list(dict.fromkeys(numbers.named(one.pieces[0].name) for one in parameter.cut.spellings))
        return MissingTensor(
            f"no tensor for {parameter.name}",
            file,
            tensor=spelled[0],
            expected=f"shape {shape}, under one of {', '.join(spelled)}",
            found="nothing",
            remedy="the shard is incomplete or of another model; copy it again",
        )
    stored_names = sorted({tensor.name for tensor in present})
    if len(stored_names) > 1 and len(fitting_spellings(catalog, parameter, file)) > 1:
        return InconsistentShards(f"{parameter.name} is stored twice", file, found=", ".join(stored_names))
    remedy = "the shard is of another model, or the args are not those it was trained with"
    if parameter.expert is not None and catalog.grid.expert_tensor < catalog.grid.tensor:
        remedy += "; if Habana's converter imported this checkpoint, add --habana-imported-experts"
    expected = f"{shape} from the args and {catalog.grid}"
    found = f"{list(present[0].shape)}"
    return WrongShape(f"wrong shape for {parameter.name}", file, expected, found, remedy, tensor=present[0].name)
