"""A checkpoint of Megatron's `torch` format as a catalog: where each box of each tensor is stored, in which files.

It serves a source, from the headers of its files, and a target, from those that its files will have (`survey`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dist_convert.errors import ConversionError, InconsistentShards, MissingTensor, WrongShape
from dist_convert.formats.megatron import names as megatron_names
from dist_convert.formats.megatron.geometry import Place, padding_places, places, shard_size
from dist_convert.formats.megatron.grid import Chunk, Grid, ShardFiles
from dist_convert.formats.megatron.names import ExpertNumber, Piece, Spelling
from dist_convert.formats.megatron.parameters import Parameter, Replica, parameters_of, stored_regions
from dist_convert.models.catalog import Region, TensorMeta
from dist_convert.models.schema import Architecture, Family
from dist_convert.records import StoredTensor, View


@dataclass(frozen=True)
class TorchCatalog:
    """A `Catalog` of rank files.

    Attributes:
        architecture, family, grid: the model, its table, and how it is cut.
        chunks: which layers each virtual pipeline stage holds.
        files: which files hold which shard.
        stored: each tensor by file and virtual stage, then by its normalised name.
        imported_experts: see `survey.open_catalog`.
        whole_latents: see `parameters.parameter_of`.
        permuted_experts: Habana's dynamic experts are stored as rows x columns.
        add_to_norms: 1 where norms are stored as gamma - 1.
        pinned: parameters whose copies differ; that of the lowest rank is taken.
        drops_mtp: layers of multi-token prediction are left out.
        with_tied_copies: the last stage's copy of a tied embedding counts as a replica of the embedding.
        tensors: the logical tensors.
        parameters: of each tensor, the parameter that it is stacked into, and its number there; without one, zeros.
        params_dtype: in which most bytes are stored.
    """

    architecture: Architecture
    family: Family
    grid: Grid
    chunks: tuple[Chunk, ...]
    files: ShardFiles
    stored: Mapping[tuple[str, int], Mapping[str, StoredTensor]]
    imported_experts: bool = False
    whole_latents: bool = False
    permuted_experts: bool = False
    add_to_norms: int = 0
    pinned: frozenset[str] = frozenset()
    with_tied_copies: bool = False
    drops_mtp: bool = False
    tensors: Mapping[str, TensorMeta] = field(default_factory=dict)
    parameters: Mapping[str, tuple[Parameter, int]] = field(default_factory=dict)
    params_dtype: str = ""

    @property
    def is_owned(self) -> bool:
        return True

    def regions(self, name: str) -> Sequence[Region]:
        """See `Catalog`; replicas are in the order of their files' ranks."""
        meta = self.tensors[name]
        if name not in self.parameters:
            return (Region(meta.box, ()),)
        parameter, number = self.parameters[name]
        row, shards, is_per_shard = parameter.row, parameter.shards, parameter.is_per_shard
        key = (id(row), shards, is_per_shard, number)
        if key not in self._places:
            self._places[key] = tuple(places(row, number, self.sizes, shards, is_per_shard=is_per_shard))
        return tuple(self._stored(parameter, self._places[key]))

    def padding(self, name: str) -> Sequence[Region]:
        if name not in self.parameters:
            return ()
        parameter, _ = self.parameters[name]
        return tuple(self._stored(parameter, tuple(padding_places(parameter.row, self.sizes, parameter.shards))))

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
    def sizes(self) -> Mapping[str, int]:
        """See `Architecture.sizes`."""
        return self.architecture.sizes()

    @cached_property
    def known_sizes(self) -> dict[tuple[int, int, bool], tuple[int, int]]:
        """What `shard_size_of` has found, by a row of the table and how it is cut: for all layers and experts."""
        return {}

    @cached_property
    def _places(self) -> dict[tuple[int, int, bool, int], tuple[Place, ...]]:
        """Those of a row's tensors, which are the same for all layers and experts too."""
        return {}

    @cached_property
    def _latest(self) -> dict[int, dict[int, tuple[Replica, ...]]]:
        """The shards of the parameter that was asked for last: the tensors stacked into it follow each other."""
        return {}

    def _stored(self, parameter: Parameter, wanted: Sequence[Place]) -> Iterator[Region]:
        add = self.add_to_norms if parameter.row.is_norm else 0
        found = self._latest.get(id(parameter))
        if found is None:
            self._latest.clear()
            found = self._latest[id(parameter)] = {}
        for place in wanted:
            if place.shard not in found:
                found[place.shard] = equal_replicas(self, parameter, place.shard)
        return stored_regions(wanted, found.__getitem__, add)


def equal_replicas(catalog: TorchCatalog, parameter: Parameter, shard: int) -> tuple[Replica, ...]:
    """Where one shard of a parameter is stored, once for every file that has it, in the same pieces.

    Raises:
        MissingTensor, WrongShape: naming the tensor and the file.
        InconsistentShards: equal copies of a shard are stored in different pieces.
    """
    found = replicas(catalog, parameter, shard)
    if parameter.name in catalog.pinned:
        return found[:1]
    if catalog.with_tied_copies:
        found += _tied_replicas(catalog, parameter, shard)
    if len(found) > 1 and len({tuple((row, view.rows) for row, _, view in replica) for replica in found}) > 1:
        raise InconsistentShards(
            "equal copies are stored in different layouts",
            tensor=parameter.name,
            file=", ".join(replica[0][2].file for replica in found),
        )
    return found


def parameters(catalog: TorchCatalog) -> Iterator[Parameter]:
    """All Megatron parameters of the model."""
    return parameters_of(
        catalog.architecture,
        catalog.grid,
        imported_experts=catalog.imported_experts,
        whole_latents=catalog.whole_latents,
    )


def shard_size_of(catalog: TorchCatalog, parameter: Parameter) -> tuple[int, int]:
    """Rows and columns of each shard of a parameter."""
    row, shards, is_per_shard = parameter.row, parameter.shards, parameter.is_per_shard
    known = catalog.known_sizes
    key = (id(row), shards, is_per_shard)
    if key not in known:
        known[key] = shard_size(row, catalog.sizes, shards, is_per_shard=is_per_shard)
    return known[key]


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
        layer = parameter.layer
        return next(c for c in catalog.chunks if c.first_layer <= layer < c.first_layer + c.layers)
    # An explicit layout may put embedding and head on any stage, so their names are looked for.
    name = "mtp.layers.0.enorm.weight" if megatron_names.is_of_mtp(parameter.name) else parameter.name
    holders = [c for c in catalog.chunks if name in catalog.stored[catalog.files.dense[c.pipeline, 0][0], c.virtual]]
    outermost = 0 if parameter.row in catalog.family.before else -1
    return (holders or catalog.chunks)[outermost]


def _spellings(catalog: TorchCatalog, parameter: Parameter) -> tuple[Spelling, ...]:
    chunk = _chunk(catalog, parameter)
    layer = None if parameter.layer is None else parameter.layer - chunk.first_layer
    number = None
    if parameter.expert is not None:
        per_rank = catalog.architecture.experts // catalog.grid.expert
        number = ExpertNumber(parameter.expert, parameter.expert % per_rank, per_rank)
    return megatron_names.spellings(parameter.row, layer, number)


def _views(stored: Mapping[str, StoredTensor], spelling: Spelling, rows: int, columns: int) -> Replica | None:
    found = []
    for piece in spelling.pieces:
        piece_rows, tensor = rows // piece.parts, stored.get(piece.name)
        seen = megatron_names.view(piece, tensor, piece_rows, columns) if tensor else None
        if seen is None:
            return None
        found.append((piece.part * piece_rows, 0, seen))
    return tuple(found)


def fitting_spellings(catalog: TorchCatalog, parameter: Parameter, file: str) -> dict[Spelling, Replica]:
    """The spellings whose pieces a file stores in fitting shapes, and where."""
    stored = catalog.stored[file, _chunk(catalog, parameter).virtual]
    size = shard_size_of(catalog, parameter)
    spelled = [spelling for spelling in _spellings(catalog, parameter) if spelling.pieces[0].name in stored]
    found = ((spelling, _views(stored, spelling, *size)) for spelling in spelled)
    return {spelling: views for spelling, views in found if views is not None}


def replicas(catalog: TorchCatalog, parameter: Parameter, shard: int) -> tuple[Replica, ...]:
    """Where one shard of a parameter is stored, once for every file that has it.

    Raises:
        MissingTensor, WrongShape: naming the tensor and the file.
    """
    found = []
    for file in files_of(catalog, parameter, shard):
        fitting = fitting_spellings(catalog, parameter, file)
        found.append(fitting[_chosen(catalog, parameter, file, fitting)])
    return tuple(found)


def _chosen(catalog: TorchCatalog, parameter: Parameter, file: str, fitting: Mapping[Spelling, Replica]) -> Spelling:
    spelling = megatron_names.choose(fitting, permuted=catalog.permuted_experts)
    if spelling is None:
        raise _not_found(catalog, parameter, file)
    return spelling


def stored_pieces(catalog: TorchCatalog, parameter: Parameter, file: str) -> list[tuple[Piece, StoredTensor, int, int]]:
    """The stored tensors that hold a shard of a parameter in one file, and how many rows and columns of it each."""
    rows, columns = parameter.shard_size(catalog.architecture)
    spelling = _chosen(catalog, parameter, file, fitting_spellings(catalog, parameter, file))
    stored = catalog.stored[file, _chunk(catalog, parameter).virtual]
    return [(piece, stored[piece.name], rows // piece.parts, columns) for piece in spelling.pieces]


def stored_as(catalog: TorchCatalog, parameter: Parameter, shard: int) -> set[tuple[str, str]]:
    """(file, tensor) of everything that any spelling of a shard names, whether it fits or not."""
    virtual = _chunk(catalog, parameter).virtual
    names = [piece.name for spelling in _spellings(catalog, parameter) for piece in spelling.pieces]
    return {
        (file, catalog.stored[file, virtual][name].name)
        for file in files_of(catalog, parameter, shard)
        for name in names
        if name in catalog.stored[file, virtual]
    }


def _tied_replicas(catalog: TorchCatalog, parameter: Parameter, shard: int) -> tuple[Replica, ...]:
    """The copies of the embedding's shard that the last pipeline stage holds, as it does where it is another one."""
    original, copy = megatron_names.TIED
    last = catalog.chunks[-1]
    if parameter.name != original:
        return ()
    if catalog.architecture.fact("mtp_layers") and last != catalog.chunks[0]:
        copy = original  # multi-token prediction reads it
    elif not catalog.architecture.tied:
        return ()
    rows, columns = parameter.shard_size(catalog.architecture)
    found = []
    for file in catalog.files.dense[last.pipeline, shard]:
        stored = catalog.stored[file, last.virtual].get(copy)
        seen = megatron_names.view(Piece(copy), stored, rows, columns) if stored else None
        if seen is not None:
            found.append(((0, 0, seen),))
    return tuple(found)


def _not_found(catalog: TorchCatalog, parameter: Parameter, file: str) -> ConversionError:
    stored = catalog.stored[file, _chunk(catalog, parameter).virtual]
    spelled = _spellings(catalog, parameter)
    present = [stored[piece.name] for s in spelled for piece in s.pieces if piece.name in stored]
    rows, columns = parameter.shard_size(catalog.architecture)
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
    if len({tensor.name for tensor in present}) > 1 and len(fitting_spellings(catalog, parameter, file)) > 1:
        return InconsistentShards(
            f"{parameter.name} is stored twice", file=file, found=", ".join(sorted({t.name for t in present}))
        )
    remedy = "the shard is of another model, or the args are not those it was trained with"
    if parameter.expert is not None and catalog.grid.expert_tensor < catalog.grid.tensor:
        remedy += "; if Habana's converter imported this checkpoint, add --habana-imported-experts"
    return WrongShape(
        f"wrong shape for {parameter.name}",
        tensor=present[0].name,
        file=file,
        expected=f"{shape} from the args and {catalog.grid}",
        found=f"{list(present[0].shape)}",
        remedy=remedy,
    )
