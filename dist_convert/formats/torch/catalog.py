"""A checkpoint of Megatron's `torch` format as a catalog: where each box of each tensor is stored, in which files.

It serves a source, from the headers of its files, and a target, from those that its files will have (`survey`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from dist_convert.errors import ConversionError, InconsistentShards, MissingTensor, WrongShape
from dist_convert.formats.megatron import names as megatron_names
from dist_convert.formats.megatron.grid import Chunk, Grid, ShardFiles, layer_chunks
from dist_convert.formats.megatron.names import Numbers, Piece, Spelling
from dist_convert.formats.megatron.parameters import MegatronCatalog, Parameter, Replica, parameters_of
from dist_convert.models.schema import Family
from dist_convert.records import StoredTensor, View


@dataclass(frozen=True, kw_only=True)
class TorchCatalog(MegatronCatalog):
    """A `Catalog` of rank files.

    Attributes:
        family, grid: the model's table, and how it is cut.
        chunks: which layers each virtual pipeline stage holds.
        files: which files hold which shard.
        stored: each tensor by file and virtual stage, then by its normalised name.
        imported_experts: see `survey.open_catalog`.
        whole_latents: see `parameters.parameters_of`.
        permuted_experts: Habana's dynamic experts are stored as rows x columns.
        pinned: parameters whose copies differ; that of the lowest rank is taken.
        drops_mtp: layers of multi-token prediction are left out.
        with_tied_copies: the last stage's copy of a tied embedding counts as a replica of the embedding.
    """

    family: Family
    grid: Grid
    chunks: tuple[Chunk, ...]
    files: ShardFiles
    stored: Mapping[tuple[str, int], Mapping[str, StoredTensor]]
    imported_experts: bool = False
    whole_latents: bool = False
    permuted_experts: bool = False
    pinned: frozenset[str] = frozenset()
    with_tied_copies: bool = False
    drops_mtp: bool = False

    def checksum(self, view: View) -> int | None:
        """What the file tells of a stored tensor, where all of it is one copy or several."""
        return self._checksums.get((view.file, view.tensor))

    @cached_property
    def _checksums(self) -> dict[tuple[str, str], int | None]:
        return {(one.file, one.name): one.checksum for chunk in self.stored.values() for one in chunk.values()}

    @property
    def title(self) -> str:
        """The model and the grid, for people."""
        return f"{self.family.hf_class}, {self.grid}"

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


def parameters(catalog: TorchCatalog) -> list[Parameter]:
    """All Megatron parameters of the model."""
    return parameters_of(
        catalog.architecture,
        catalog.grid,
        imported_experts=catalog.imported_experts,
        whole_latents=catalog.whole_latents,
    )


def files_of(catalog: TorchCatalog, parameter: Parameter, shard: int) -> tuple[str, ...]:
    """The files that hold equal copies of one shard of a parameter."""
    pipeline = _chunk(catalog, parameter).pipeline
    if parameter.expert is not None:
        rank = parameter.expert // (catalog.architecture.experts // catalog.grid.expert)
        return catalog.files.experts[pipeline, rank, shard]
    if parameter.row.split == "replicated":
        return tuple(file for tensor in range(catalog.grid.tensor) for file in catalog.files.dense[pipeline, tensor])
    return catalog.files.dense[pipeline, shard]


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
    return [c for c in catalog.chunks if name in catalog.stored[catalog.files.dense[c.pipeline, 0][0], c.virtual]]


def _numbers(catalog: TorchCatalog, parameter: Parameter) -> Numbers:
    """Of a parameter in its file and rank."""
    layer = None if parameter.layer is None else parameter.layer - _chunk(catalog, parameter).first_layer
    if parameter.expert is None:
        return Numbers(layer)
    per_rank = catalog.architecture.experts // catalog.grid.expert
    return Numbers(layer, parameter.expert, parameter.expert % per_rank, per_rank)


def _views(stored: Mapping[str, StoredTensor], pieces: Sequence[Piece], rows: int, columns: int) -> Replica | None:
    found = []
    for piece in pieces:
        piece_rows, tensor = rows // piece.parts, stored.get(piece.name)
        seen = megatron_names.view(piece, tensor, piece_rows, columns) if tensor else None
        if seen is None:
            return None
        found.append((piece.part * piece_rows, 0, seen))
    return tuple(found)


def fitting_spellings(catalog: TorchCatalog, parameter: Parameter, file: str) -> list[tuple[Spelling, Replica]]:
    """The spellings whose pieces a file stores in fitting shapes, and where."""
    stored = catalog.stored[file, _chunk(catalog, parameter).virtual]
    numbers, size = _numbers(catalog, parameter), parameter.cut.shard_size
    spelled = [one for one in parameter.cut.spellings if numbers.named(one.pieces[0].name) in stored]
    found = [(spelling, _views(stored, spelling.at(numbers), *size)) for spelling in spelled]
    return [(spelling, views) for spelling, views in found if views is not None]


def _chosen(catalog: TorchCatalog, parameter: Parameter, file: str) -> tuple[Spelling, Replica]:
    fitting = fitting_spellings(catalog, parameter, file)
    chosen = megatron_names.choose([spelling for spelling, _ in fitting], permuted=catalog.permuted_experts)
    for spelling, views in fitting:
        if spelling is chosen:
            return spelling, views
    raise _not_found(catalog, parameter, file)


def stored_pieces(catalog: TorchCatalog, parameter: Parameter, file: str) -> list[tuple[Piece, StoredTensor, int, int]]:
    """The stored tensors that hold a shard of a parameter in one file, and how many rows and columns of it each."""
    rows, columns = parameter.cut.shard_size
    spelling, _ = _chosen(catalog, parameter, file)
    stored = catalog.stored[file, _chunk(catalog, parameter).virtual]
    pieces = spelling.at(_numbers(catalog, parameter))
    return [(piece, stored[piece.name], rows // piece.parts, columns) for piece in pieces]


def _all_names(catalog: TorchCatalog, parameter: Parameter) -> list[str]:
    """Under which a parameter may be stored, in part or as a whole."""
    numbers = _numbers(catalog, parameter)
    return [numbers.named(piece.name) for spelling in parameter.cut.spellings for piece in spelling.pieces]


def stored_as(catalog: TorchCatalog, parameter: Parameter, shard: int) -> set[tuple[str, str]]:
    """(file, tensor) of everything that any spelling of a shard names, whether it fits or not."""
    virtual = _chunk(catalog, parameter).virtual
    names = _all_names(catalog, parameter)
    return {
        (file, catalog.stored[file, virtual][name].name)
        for file in files_of(catalog, parameter, shard)
        for name in names
        if name in catalog.stored[file, virtual]
    }


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
    rows, columns = parameter.cut.shard_size
    found = []
    for file in catalog.files.dense[holder.pipeline, shard]:
        stored = catalog.stored[file, holder.virtual].get(name)
        seen = megatron_names.view(Piece(name), stored, rows, columns) if stored else None
        if seen is not None:
            found.append(((0, 0, seen),))
    return tuple(found)


def _not_found(catalog: TorchCatalog, parameter: Parameter, file: str) -> ConversionError:
    stored = catalog.stored[file, _chunk(catalog, parameter).virtual]
    present = [stored[name] for name in _all_names(catalog, parameter) if name in stored]
    rows, columns = parameter.cut.shard_size
    shape = [rows] if columns == 1 else [rows, columns]
    if not present:
        spelled = list(
            dict.fromkeys(_numbers(catalog, parameter).named(one.pieces[0].name) for one in parameter.cut.spellings)
        )
        return MissingTensor(
            f"no tensor for {parameter.name}",
            file,
            tensor=spelled[0],
            expected=f"shape {shape}, under one of {', '.join(spelled)}",
            found="nothing",
            remedy="the shard is incomplete or of another model; copy it again",
        )
    if len({tensor.name for tensor in present}) > 1 and len(fitting_spellings(catalog, parameter, file)) > 1:
        return InconsistentShards(
            f"{parameter.name} is stored twice", file, found=", ".join(sorted({t.name for t in present}))
        )
    remedy = "the shard is of another model, or the args are not those it was trained with"
    if parameter.expert is not None and catalog.grid.expert_tensor < catalog.grid.tensor:
        remedy += "; if Habana's converter imported this checkpoint, add --habana-imported-experts"
    expected = f"{shape} from the args and {catalog.grid}"
    found = f"{list(present[0].shape)}"
    return WrongShape(f"wrong shape for {parameter.name}", file, expected, found, remedy, tensor=present[0].name)
