"""The Megatron side of a plan, source or target: where each shard of each parameter of the tables is stored.

Geometry first: where each Hugging Face tensor lies inside the shards of the parameter that it is stacked into
(docs/formats.md, "Attention and the query-group interleave" and "MLP and the gate-up interleave"). Then the files. At
the end the survey: every parameter found, every stored tensor accounted for, all that is wrong raised together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from dist_convert.errors import (
    ConversionError,
    InconsistentShards,
    MissingTensor,
    PlanError,
    UnknownTensor,
    UnsupportedModel,
    WrongShape,
    raise_together,
)
from dist_convert.formats.megatron import names as megatron_names
from dist_convert.formats.megatron.grid import Chunk, Grid, ShardFiles, place_chunks
from dist_convert.formats.megatron.names import ExpertNumber, Piece, Spelling, describe_homeless
from dist_convert.models.schema import Architecture, Entry, Family, Part, Row, moves_of_layer
from dist_convert.read.megatron import Shard
from dist_convert.records import FLOAT_DTYPES, Box, StoredTensor, View, intersect


@dataclass(frozen=True)
class Segment:
    """A box of a Hugging Face tensor and the equal box of a Megatron shard.

    Attributes:
        part: number of the Hugging Face tensor in the row's parts.
        hf: box in that tensor.
        shard: number of the shard along the row's split.
        megatron: box in that shard.
    """

    part: int
    hf: Box
    shard: int
    megatron: Box


def part_shape(part: Part, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Elements per dimension of a Hugging Face tensor."""
    return tuple(sizes[dim] for dim in part.dims)


def part_size(part: Part, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Rows and columns of a Hugging Face tensor; a vector has one column."""
    shape = part_shape(part, sizes)
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)


def shard_count(row: Row, tensor_parallel: int) -> int:
    """How many different shards a parameter has on a grid of that (expert) tensor parallel size."""
    return 1 if row.split == "replicated" else tensor_parallel


def shard_size(row: Row, sizes: Mapping[str, int], shards: int) -> tuple[int, int]:
    """Rows and columns of each shard of a Megatron parameter.

    Raises:
        PlanError: the parameter cannot be cut into that many equal shards.
    """
    rows = sum(part_size(part, sizes)[0] for part in row.parts)
    rows = sizes[row.padded_rows] if row.padded_rows else rows
    columns = part_size(row.parts[0], sizes)[1]
    length = {"rows": rows, "columns": columns, "replicated": shards}[row.split]
    uneven = row.interleave == "shards" and any(part_size(part, sizes)[0] % shards for part in row.parts)
    if length % shards or uneven:
        raise PlanError(
            f"cannot be cut into {shards} equal shards",
            tensor=row.megatron,
            expected=f"a multiple of {shards} {row.split}",
            found=" + ".join(f"{part_size(part, sizes)[0]}" for part in row.parts) + f" rows, {columns} columns",
            remedy="the tensor parallel size in the checkpoint's args does not belong to this model",
        )
    return (
        rows // shards if row.split == "rows" else rows,
        columns // shards if row.split == "columns" else columns,
    )


def segments(row: Row, sizes: Mapping[str, int], shards: int) -> Iterator[Segment]:
    """All boxes of a parameter, in the order of the Megatron shards' rows.

    Column-split parameters share their row range, so that their boxes can be joined to whole rows.
    """
    shard_rows, shard_columns = shard_size(row, sizes, shards)
    if row.split != "rows":
        rows, _ = part_size(row.parts[0], sizes)
        for shard in range(shards):
            box = Box(0, shard * shard_columns, rows, shard_columns)
            yield Segment(0, box, shard, Box(0, 0, rows, shard_columns))
        return
    blocks = {"shards": shards, "query_groups": sizes["query_groups"], "none": 1}[row.interleave]
    rows_of_parts = [part_size(part, sizes)[0] // blocks for part in row.parts]
    stacked_row = 0
    for block in range(blocks):
        for number, rows in enumerate(rows_of_parts):
            yield from _cut(number, block * rows, stacked_row, rows, shard_rows, shard_columns)
            stacked_row += rows


def _cut(part: int, hf_row: int, stacked_row: int, rows: int, shard_rows: int, columns: int) -> Iterator[Segment]:
    """Cut rows of the stacked parameter at the shards' borders (a query group may lie in two shards)."""
    whole = Box(stacked_row, 0, rows, columns)
    for shard in range(stacked_row // shard_rows, (stacked_row + rows - 1) // shard_rows + 1):
        common = intersect(whole, Box(shard * shard_rows, 0, shard_rows, columns))
        if common is not None:
            hf = Box(hf_row + common.row - stacked_row, 0, common.rows, columns)
            yield Segment(part, hf, shard, Box(common.row - shard * shard_rows, 0, common.rows, columns))


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
        (shard.file, virtual): {megatron_names.normalise(name): tensor for name, tensor in chunk.items()}
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
    return max((layer + 1 for name in names if (layer := megatron_names.layer_of(name)) is not None), default=0)


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
    return megatron_names.spellings(parameter.row.megatron, layer, number)


def _views(side: MegatronSide, parameter: Parameter, file: str, spelling: Spelling) -> Replica | None:
    rows, columns = shard_size(parameter.row, side.architecture.sizes(), parameter.shards)
    stored = side.tensors[file, _chunk(side, parameter).virtual]
    found = []
    for piece in spelling.pieces:
        piece_rows = rows // piece.parts
        tensor = stored.get(piece.name)
        seen = megatron_names.view(piece, tensor, piece_rows, columns) if tensor else None
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
        spelling = megatron_names.choose(fitting, permuted=side.permuted_experts)
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
    original, copy = megatron_names.TIED
    last = side.chunks[-1]
    if parameter.name != original or not side.architecture.tied or last == side.chunks[0]:
        return ()
    rows, columns = shard_size(parameter.row, side.architecture.sizes(), parameter.shards)
    found = []
    for file in side.files.dense[last.pipeline, shard]:
        stored = side.tensors[file, last.virtual].get(copy)
        seen = megatron_names.view(Piece(copy), stored, rows, columns) if stored else None
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


#: Args that must be the same in every shard; they decide where bytes go.
_SAME_IN_ALL = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "padded_vocab_size", "num_experts", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "rotary_base", "params_dtype", "vocab_size",
    "untie_embeddings_and_output_weights", "norm_epsilon", "use_rope_scaling", "moe_router_topk", "apply_layernorm_1p",
    "group_query_attention", "max_position_embeddings", "add_bias_linear", "add_qkv_bias", "moe_ffn_hidden_size",
)  # fmt: skip


def check_same_run(shards: Iterable[Shard]) -> None:
    """Refuse shards whose iteration or sizes differ.

    Raises:
        InconsistentShards: naming the first file and the one that differs from it.
    """
    listed = sorted(shards, key=lambda shard: shard.file)
    first = listed[0]
    problems = []
    for shard in listed[1:]:
        pairs = [("iteration", first.iteration, shard.iteration)]
        pairs += [(name, first.args.get(name), shard.args.get(name)) for name in _SAME_IN_ALL]
        pairs += [("number of models", len(first.chunks), len(shard.chunks))]
        problems += [
            InconsistentShards(
                f"two shards disagree about {name}",
                file=shard.file,
                expected=f"{expected!r} as in {first.file}",
                found=repr(found),
                remedy="shards of different runs or iterations were mixed; copy this one again",
            )
            for name, expected, found in pairs
            if expected != found
        ]
    raise_together(problems)


@dataclass(frozen=True)
class Survey:
    """What the headers showed: the dtype of every parameter, and what is dropped on purpose, by reason.

    `left_behind` holds (reason, tensors, bytes).
    """

    dtypes: Mapping[str, str]
    params_dtype: str
    left_behind: tuple[tuple[str, int, int], ...]


def survey(side: MegatronSide, shards: Mapping[str, Shard]) -> Survey:
    """Find every parameter in every shard and account for every stored tensor.

    Raises:
        Problems, or the one problem there is: MissingTensor, WrongShape, UnknownTensor, UnsupportedModel.
    """
    problems: list[ConversionError] = []
    dtypes: dict[str, str] = {}
    used: set[tuple[str, str]] = set()
    bytes_of: Counter[str] = Counter()
    for parameter in parameters(side):
        for shard in range(parameter.shards):
            try:
                found = replicas(side, parameter, shard)
            except (MissingTensor, WrongShape, InconsistentShards, PlanError) as problem:
                problems.append(problem)
                used |= stored_as(side, parameter, shard)
                continue
            for view in (view for replica in found for _, view in replica):
                used.add((view.file, view.tensor))
                problems += _dtype_problems(view, dtypes.setdefault(parameter.name, view.dtype))
            bytes_of[found[0][0][1].dtype] += sum(view.size_bytes for _, view in found[0])
    left_behind, unknown = _leftovers(side, shards, used)
    raise_together(problems + unknown)
    return Survey(dtypes, bytes_of.most_common(1)[0][0], left_behind)


def _dtype_problems(view: View, expected: str) -> list[ConversionError]:
    if view.dtype == expected and view.dtype in FLOAT_DTYPES:
        return []
    return [
        WrongShape(
            "a weight of an unexpected dtype",
            tensor=view.tensor,
            file=view.file,
            expected=f"{expected if expected in FLOAT_DTYPES else ' or '.join(FLOAT_DTYPES)} in every shard",
            found=view.dtype,
            remedy="quantised and mixed shards are not converted; save the checkpoint in bf16, fp16 or fp32",
        )
    ]


def _leftovers(
    side: MegatronSide, shards: Mapping[str, Shard], used: set[tuple[str, str]]
) -> tuple[tuple[tuple[str, int, int], ...], list[ConversionError]]:
    counts: Counter[str] = Counter()
    sizes_bytes: Counter[str] = Counter()
    unknown: list[ConversionError] = []
    for shard in shards.values():
        for chunk, opaque in zip(shard.chunks, shard.opaque, strict=True):
            unused = {name: tensor for name, tensor in chunk.items() if (shard.file, tensor.name) not in used}
            names = {name: tensor.size_bytes for name, tensor in unused.items()}
            for name, size_bytes in {**names, **dict.fromkeys(opaque, 0)}.items():
                reason = _reason_to_drop(side, megatron_names.normalise(name))
                if reason is None:
                    unknown.append(_unknown(side, shard.file, name, opaque.get(name)))
                else:
                    counts[reason] += 1
                    sizes_bytes[reason] += size_bytes
    return tuple((reason, counts[reason], sizes_bytes[reason]) for reason in sorted(counts)), unknown


def _reason_to_drop(side: MegatronSide, name: str) -> str | None:
    if megatron_names.CAPACITY_BINS in name:
        return "capacity bins (statistics of training)"
    if megatron_names.holds_no_weights(name):
        return "extra state (no weights)"
    if megatron_names.is_tied_copy(name) and side.architecture.tied and side.chunks[-1] != side.chunks[0]:
        return "output layer (equal to the embedding that it is tied to)"
    return None


def _unknown(side: MegatronSide, file: str, name: str, kind: str | None) -> ConversionError:
    what = f"an entry of class {kind}" if kind else describe_homeless(megatron_names.normalise(name))
    return UnknownTensor(
        f"{name} has no place in a {side.family.name} model",
        tensor=name,
        file=file,
        expected=f"only parameters of {side.family.hf_class}",
        found=what,
        remedy="nothing is dropped silently: convert with a family that has this parameter",
    )
