"""What is converted into what, byte by byte, whoever does it: from both ends' headers, in both directions.

Pure: integers and strings, no torch, no files, no process groups.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from dist_convert.errors import ConversionError, PlanError, UnsupportedModel, raise_together
from dist_convert.formats.megatron.grid import Grid, ShardFiles, find_shards, grid_from_args
from dist_convert.formats.megatron.names import has_fused_norm
from dist_convert.models import FAMILIES
from dist_convert.models.schema import Architecture, Family, Row
from dist_convert.plan.megatron import MegatronSide, Survey, entries, megatron_side, part_shape, part_size, survey
from dist_convert.plan.moves import Move, Sides, check_cover, plan_moves
from dist_convert.read.megatron import Shard
from dist_convert.records import FLOAT_DTYPES, StoredTensor, TargetFile, TensorSpec, View, local_name
from dist_convert.write.safetensors_files import lay_out_files


@dataclass(frozen=True)
class Content:
    """A conversion without its division over ranks.

    Attributes:
        sides: both ends, and which is the source.
        files: the target's weights files.
        moves: one for each Megatron parameter.
        params_dtype: safetensors name of the dtype in which most of the source is stored.
        target_dtype: what that becomes; tensors of other dtypes keep theirs. None keeps all.
        kept_dtypes: tensors that are not stored in `params_dtype`, with their dtype.
        left_behind: what is not converted on purpose: (reason, tensors, bytes).
        zero_tensors: names of target tensors that stay zero.
    """

    sides: Sides
    files: tuple[TargetFile, ...]
    moves: tuple[Move, ...]
    params_dtype: str
    target_dtype: str | None
    kept_dtypes: Mapping[str, str]
    left_behind: tuple[tuple[str, int, int], ...]
    zero_tensors: tuple[str, ...] = ()

    @property
    def side(self) -> MegatronSide:
        return self.sides.megatron

    @property
    def target_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def moved_bytes(self) -> int:
        return sum(move.written_bytes for move in self.moves)

    @cached_property
    def digest(self) -> str:
        """Names what is converted into what: the same for any number of ranks, placement and budget.

        Parts of moves (see `file_owners`) name it as the whole ones do.
        """
        side = self.side
        return digest(
            {
                "architecture": asdict(side.architecture),
                "family": asdict(side.family),
                "grid": asdict(side.grid),
                "megatron": [[f, v, *sorted(map(_fields, t.values()))] for (f, v), t in sorted(side.tensors.items())],
                "huggingface": [asdict(view) for view in dict.fromkeys(v for move in self.moves for v in move.hf)],
                "target": [[file.name, hashlib.sha256(file.header).hexdigest()] for file in self.files],
                "directions": [self.sides.to_megatron, self.sides.add_to_norms, self.sides.repeat_last_row],
                "permuted_experts": side.permuted_experts,
            }
        )


def _fields(tensor: StoredTensor) -> list[Any]:
    return [tensor.name, tensor.dtype, tensor.shape, tensor.strides, tensor.offset_bytes]


def digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def locate_shards(shards: Mapping[str, Shard], *, imported_experts: bool) -> tuple[Grid, ShardFiles]:
    """The grid of the checkpoint and its files, from the headers by file name.

    Raises:
        MissingShard, UnsupportedModel: see `formats.megatron.grid`.
    """
    first = shards[min(shards)]
    grid = grid_from_args(first.args, len(first.chunks), imported_experts=imported_experts)
    return grid, find_shards(grid, [file.partition("/")[0] for file in shards])


def plan_to_huggingface(
    shards: Mapping[str, Shard],
    architecture: Architecture,
    *,
    target_dtype: str | None,
    max_shard_size_bytes: int,
    imported_experts: bool = False,
) -> Content:
    """Work out every byte that is to be read and written.

    Args:
        shards: the headers, by file.
        architecture: the model, with the true vocabulary size.
        target_dtype: safetensors name, or None to keep every dtype.
        max_shard_size_bytes: of a weights file.
        imported_experts: the experts were written by an importer that did not interleave gate and up rows over
            tensor parallel ranks (docs/formats.md, "Known defects of earlier tools").

    Raises:
        Problems, or the one problem there is: all that the headers show to be wrong.
    """
    grid, files = locate_shards(shards, imported_experts=imported_experts)
    family = FAMILIES[architecture.family]
    if imported_experts:
        family = without_expert_interleave(family)
    side = megatron_side(shards, architecture, family, grid, files)
    found = survey(side, shards)
    specs, zero_tensors = _target_tensors(side, found, target_dtype)
    targets = lay_out_files(specs, max_shard_size_bytes)
    sides = Sides(side, to_megatron=False, add_to_norms=added_to_norms(shards))
    moves = plan_moves(sides, {tensor.name: View.of(tensor) for file in targets for tensor in file.tensors})
    check_cover(side, moves)
    return Content(
        sides=sides,
        files=targets,
        moves=moves,
        params_dtype=found.params_dtype,
        target_dtype=target_dtype,
        kept_dtypes={name: dtype for name, dtype in found.dtypes.items() if dtype != found.params_dtype},
        left_behind=found.left_behind,
        zero_tensors=zero_tensors,
    )


def without_expert_interleave(family: Family) -> Family:
    """A family whose experts' gate and up rows are not interleaved over tensor parallel ranks."""
    layer = tuple(
        replace(entry, interleave="none") if isinstance(entry, Row) and "{expert}" in entry.megatron else entry
        for entry in family.layer
    )
    return replace(family, layer=layer)


def _target_tensors(
    side: MegatronSide, found: Survey, target_dtype: str | None
) -> tuple[list[TensorSpec], tuple[str, ...]]:
    sizes = side.architecture.sizes()
    specs: list[TensorSpec] = []
    zero_tensors = []
    for entry, layer, expert in entries(side.family, side.architecture):
        if isinstance(entry, Row):
            stored = found.dtypes[entry.megatron.format(layer=layer, expert=expert)]
            parts = entry.parts
        else:
            stored, parts = found.params_dtype, (entry.part,)
        dtype = target_dtype if target_dtype and stored == found.params_dtype else stored
        for part in parts:
            name = part.name.format(layer=layer, expert=expert)
            specs.append((name, dtype, part_shape(part, sizes)))
            if not isinstance(entry, Row):
                zero_tensors.append(name)
    return specs, tuple(zero_tensors)


def added_to_norms(shards: Mapping[str, Shard]) -> int:
    """1 where norms are stored as gamma - 1 (docs/formats.md, "Norms and their spellings").

    Raises:
        UnsupportedModel: the args ask for it, but nothing shows whether the norm's class obeyed.
    """
    args = shards[min(shards)].args
    if not args.get("apply_layernorm_1p"):
        return 0
    fused = any(has_fused_norm(name) for s in shards.values() for chunk in s.chunks for name in chunk)
    is_habana = "use_fused_rmsnorm" in args
    if fused != is_habana:
        return int(fused)  # Transformer Engine's norms obey, Habana's own RMSNorm ignores the argument
    raise UnsupportedModel(
        "it cannot be told whether the norms are stored as gamma - 1",
        file=min(shards),
        expected="--apply-layernorm-1p with one kind of norm in all layers",
        found="norms of Transformer Engine beside Habana's" if fused else "norms that refuse --apply-layernorm-1p",
        remedy="save the checkpoint without --apply-layernorm-1p",
    )


#: Finds a table's part among the stored tensors: (name template, layer, expert, rows, columns) -> where it is.
FindPart = Callable[[str, int | None, int | None, int, int], View]


def find_parts(architecture: Architecture, find: FindPart) -> tuple[dict[str, View], list[ConversionError]]:
    """Every Hugging Face tensor that the tables name, by its canonical name, and what is missing or misshapen."""
    sizes = architecture.sizes()
    problems: list[ConversionError] = []
    found: dict[str, View] = {}
    for entry, layer, expert in entries(FAMILIES[architecture.family], architecture):
        for part in entry.parts if isinstance(entry, Row) else ():
            rows, columns = part_size(part, sizes)
            try:
                found[part.name.format(layer=layer, expert=expert)] = find(part.name, layer, expert, rows, columns)
            except ConversionError as problem:
                problems.append(problem)
    return found, problems


def target_dtypes(
    architecture: Architecture, parts: Mapping[str, View], target_dtype: str | None
) -> tuple[str, dict[str, str]]:
    """The dtype of most of the source, and for each Megatron parameter the dtype that it is written in.

    Raises:
        UnsupportedModel: a parameter whose parts are stored in several dtypes, or in one that is no float.
    """
    bytes_of: Counter[str] = Counter()
    for view in parts.values():
        bytes_of[view.dtype] += view.size_bytes
    main = bytes_of.most_common(1)[0][0]
    problems: list[ConversionError] = []
    dtypes = {}
    for entry, layer, expert in entries(FAMILIES[architecture.family], architecture):
        if isinstance(entry, Row):
            views = [parts[part.name.format(layer=layer, expert=expert)] for part in entry.parts]
            stored = {view.dtype for view in views}
            if len(stored) > 1 or not stored.issubset(FLOAT_DTYPES):
                problems.append(
                    UnsupportedModel(
                        "tensors that become one Megatron parameter need one floating point dtype",
                        tensor=", ".join(view.tensor for view in views),
                        file=views[0].file,
                        expected=f"one of {', '.join(FLOAT_DTYPES)}",
                        found=", ".join(sorted(stored)),
                        remedy="save the model unquantised in one dtype",
                    )
                )
            dtype = views[0].dtype
            name = entry.megatron.format(layer=layer, expert=expert)
            dtypes[name] = target_dtype if target_dtype and dtype == main else dtype
    raise_together(problems)
    return main, dtypes


def plan_to_megatron(
    parts: Mapping[str, View],
    shards: Mapping[str, Shard],
    architecture: Architecture,
    grid: Grid,
    *,
    params_dtype: str,
    target_dtype: str | None,
    repeat_last_row: bool,
    extras: frozenset[tuple[str, str]],
    left_behind: tuple[tuple[str, int, int], ...],
) -> Content:
    """Work out every byte that is to be read and written.

    Args:
        parts: the source, from `find_parts`.
        shards: the target's own headers, by file: its skeletons as `read_shard` sees them. On the nodes' own disks a
            file may be at several places, under `name_at` each of them.
        architecture, grid: the target.
        params_dtype, target_dtype: from `target_dtypes`, and as asked for.
        repeat_last_row: fill padding rows of the vocabulary with the last real one, not with zeros.
        extras: (file, tensor) of the target that are filled with something else than weights.
        left_behind: (reason, tensors, bytes) of the source that are not converted on purpose.
    """
    files = _find_shards_at_places(grid, shards)
    side = megatron_side(shards, architecture, FAMILIES[architecture.family], grid, files)
    sides = Sides(side, to_megatron=True, repeat_last_row=repeat_last_row)
    targets = tuple(
        TargetFile(file, b"", shard.size_bytes, tuple(t for chunk in shard.chunks for t in chunk.values()))
        for file, shard in sorted(shards.items())
    )
    moves = plan_moves(sides, parts)
    check_cover(side, moves)
    _check_all_filled(moves, targets, extras)
    kept = {name: view.dtype for name, view in parts.items() if view.dtype != params_dtype}
    return Content(sides, targets, moves, params_dtype, target_dtype, kept, left_behind)


def _find_shards_at_places(grid: Grid, planned: Iterable[str]) -> ShardFiles:
    """The planned files of each shard: copies at several places are equal copies."""
    at: dict[str, list[str]] = {}
    for file in sorted(planned):
        at.setdefault(local_name(file), []).append(file)
    found = find_shards(grid, [file.partition("/")[0] for file in at])
    return ShardFiles(
        {shard: tuple(name for file in files for name in at[file]) for shard, files in found.dense.items()},
        {shard: tuple(name for file in files for name in at[file]) for shard, files in found.experts.items()},
    )


def _check_all_filled(
    moves: Iterable[Move], targets: tuple[TargetFile, ...], extras: frozenset[tuple[str, str]]
) -> None:
    filled = {
        (view.file, view.tensor) for move in moves for shard in move.stored for replica in shard for _, view in replica
    } | extras
    raise_together(
        [
            PlanError("nothing fills a tensor of the target", tensor=tensor.name, file=file.name)
            for file in targets
            for tensor in file.tensors
            if (file.name, tensor.name) not in filled
        ]
    )
