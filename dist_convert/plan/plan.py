"""The whole plan of a conversion: what is in the source, what will be in the target, and which rank does what.

Pure: integers and strings, no torch, no files, no process groups. Every rank makes the same plan from the same
headers; one digest of it is compared before any byte moves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dist_convert.errors import UnsupportedModel
from dist_convert.layout import Grid, ShardFiles, find_shards, grid_from_args
from dist_convert.models import FAMILIES
from dist_convert.models.architecture import Architecture
from dist_convert.models.schema import Family, Row
from dist_convert.plan.geometry import part_shape
from dist_convert.plan.limits import Limits, largest_send_bytes, limits
from dist_convert.plan.moves import Move, check_cover, plan_moves
from dist_convert.plan.source import MegatronSide, entries, megatron_side
from dist_convert.plan.steps import Step, steps_of_rank
from dist_convert.plan.survey import Survey, survey
from dist_convert.plan.teams import Team, form_teams
from dist_convert.read.megatron_shard import Shard
from dist_convert.records import TargetFile
from dist_convert.write.safetensors_files import TensorSpec, lay_out_files


@dataclass(frozen=True)
class Content:
    """What is converted into what, whoever does it.

    Attributes:
        side: the Megatron checkpoint.
        survey: what its headers showed.
        target_dtype: safetensors name for tensors stored in the checkpoint's params dtype, or None to keep.
        files: the target's weights files.
        moves: one for each Megatron parameter.
        zero_tensors: names of target tensors that stay zero.
        add_to_norms: 1 where norms are stored as gamma - 1, else 0.
    """

    side: MegatronSide
    survey: Survey
    target_dtype: str | None
    files: tuple[TargetFile, ...]
    moves: tuple[Move, ...]
    zero_tensors: tuple[str, ...]
    add_to_norms: int

    @property
    def target_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def moved_bytes(self) -> int:
        return sum(move.size_bytes for move in self.moves)

    @property
    def kept_dtypes(self) -> dict[str, str]:
        """Parameters that are not stored in the params dtype and therefore keep theirs."""
        return {name: dtype for name, dtype in self.survey.dtypes.items() if dtype != self.survey.params_dtype}


@dataclass(frozen=True)
class Plan:
    """A content, and its division over ranks.

    Attributes:
        content: what is converted.
        placement: "gather" or "direct".
        visible: for each rank, the shard files that it can read.
        teams: disjoint groups of ranks with their shares.
        limits: for each team, its members' buffer sizes.
    """

    content: Content
    placement: str
    visible: tuple[frozenset[str], ...]
    teams: tuple[Team, ...]
    limits: tuple[Limits, ...]

    def place_of(self, rank: int) -> tuple[int, int]:
        """A rank's team, and its position in it."""
        return next((n, team.ranks.index(rank)) for n, team in enumerate(self.teams) if rank in team.ranks)

    def steps(self, rank: int) -> Iterator[Step]:
        """What a rank does, in order; expanded while it is iterated."""
        number, member = self.place_of(rank)
        return steps_of_rank(
            self.content.side,
            self.content.moves,
            self.teams[number],
            member,
            self.visible,
            self.limits[number],
            add_to_norms=self.content.add_to_norms,
        )


def locate_shards(shards: Mapping[str, Shard], *, imported_experts: bool) -> tuple[Grid, ShardFiles]:
    """The grid of the checkpoint and its files, from the headers by file name.

    Raises:
        MissingShard, UnsupportedModel: see `layout`.
    """
    first = shards[min(shards)]
    grid = grid_from_args(first.args, len(first.chunks), imported_experts=imported_experts)
    return grid, find_shards(grid, [file.partition("/")[0] for file in shards])


def plan_content(
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
        family = _without_expert_interleave(family)
    side = megatron_side(shards, architecture, family, grid, files)
    found = survey(side, shards)
    specs, zero_tensors = _target_tensors(side, found, target_dtype)
    targets = lay_out_files(specs, max_shard_size_bytes)
    moves = plan_moves(side, {tensor.name: tensor for file in targets for tensor in file.tensors})
    check_cover(side, moves)
    add = _added_to_norms(shards)
    return Content(side, found, target_dtype, targets, moves, zero_tensors, add)


def _without_expert_interleave(family: Family) -> Family:
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


def _added_to_norms(shards: Mapping[str, Shard]) -> int:
    """1 where norms are stored as gamma - 1 (docs/formats.md, "Norms and their spellings").

    Raises:
        UnsupportedModel: the args ask for it, but nothing shows whether the norm's class obeyed.
    """
    args = shards[min(shards)].args
    if not args.get("apply_layernorm_1p"):
        return 0
    fused = any(name.endswith("layer_norm_weight") for s in shards.values() for chunk in s.chunks for name in chunk)
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


def divide(content: Content, visible: Sequence[frozenset[str]], *, placement: str, budget_bytes: int) -> Plan:
    """Divide a content over ranks.

    Args:
        content: what is converted.
        visible: for each rank, the shard files that it can read.
        placement: "gather" or "direct".
        budget_bytes: of memory, for each rank.

    Raises:
        BudgetTooSmall, UsageError, MissingShard: see `teams` and `steps`.
    """
    teams = form_teams(content.moves, visible, placement)
    sizes = tuple(
        limits(budget_bytes, len(team.ranks), largest_send_bytes(content.moves, team, visible)) for team in teams
    )
    return Plan(content, placement, tuple(visible), teams, sizes)


def content_digest(content: Content) -> str:
    """Names what is converted into what: the same for any number of ranks, placement and budget."""
    side = content.side
    return _digest(
        {
            "architecture": asdict(side.architecture),
            "family": asdict(side.family),
            "grid": asdict(side.grid),
            "tensors": [[f, v, *sorted(map(_fields, t.values()))] for (f, v), t in sorted(side.tensors.items())],
            "target": [[file.name, hashlib.sha256(file.header).hexdigest()] for file in content.files],
            "permuted_experts": side.permuted_experts,
            "add_to_norms": content.add_to_norms,
        }
    )


def _fields(tensor: Any) -> list[Any]:
    return [tensor.name, tensor.dtype, tensor.shape, tensor.strides, tensor.offset_bytes]


def schedule_digest(plan: Plan) -> str:
    """Names who does what in one run; the ranks of the run compare it."""
    return _digest(
        {
            "content": content_digest(plan.content),
            "placement": plan.placement,
            "teams": [asdict(team) for team in plan.teams],
            "limits": [asdict(limit) for limit in plan.limits],
        }
    )


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
