"""The plan's content for Megatron to Hugging Face: from the shards' headers to every byte of the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dist_convert.dialects import has_fused_norm
from dist_convert.errors import UnsupportedModel
from dist_convert.layout import Grid, ShardFiles, find_shards, grid_from_args
from dist_convert.models import FAMILIES
from dist_convert.models.architecture import Architecture
from dist_convert.models.schema import Family, Row
from dist_convert.plan.content import Content
from dist_convert.plan.geometry import part_shape
from dist_convert.plan.megatron import MegatronSide, entries, megatron_side
from dist_convert.plan.moves import Sides, check_cover, plan_moves
from dist_convert.plan.survey import Survey, survey
from dist_convert.read.megatron_shard import Shard
from dist_convert.records import TensorSpec, View
from dist_convert.write.safetensors_files import lay_out_files


def locate_shards(shards: Mapping[str, Shard], *, imported_experts: bool) -> tuple[Grid, ShardFiles]:
    """The grid of the checkpoint and its files, from the headers by file name.

    Raises:
        MissingShard, UnsupportedModel: see `layout`.
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
