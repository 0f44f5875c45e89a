"""The plan's content for Hugging Face to Megatron: from the tensors' headers to every byte of every shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from dist_convert.errors import ConversionError, PlanError, UnsupportedModel, raise_together
from dist_convert.layout import Grid, ShardFiles, find_shards
from dist_convert.models import FAMILIES
from dist_convert.models.architecture import Architecture
from dist_convert.models.schema import Row
from dist_convert.plan.content import Content
from dist_convert.plan.geometry import part_size
from dist_convert.plan.megatron import entries, megatron_side
from dist_convert.plan.moves import Move, Sides, check_cover, plan_moves
from dist_convert.plan.node_local import local_name
from dist_convert.read.megatron_shard import Shard
from dist_convert.records import FLOAT_DTYPES, TargetFile, View

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
