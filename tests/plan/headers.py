"""Headers of Megatron checkpoints of any size and grid, made without files: shapes as Megatron's modules declare them.

Shapes and directory names are spelled out here once more, so that the planner's own are compared with something.
Imports no torch: planning is tested without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import lcm, prod
from typing import Any

from dist_convert.formats.huggingface.files import catalog_of_files, lay_out_files, target_tensors
from dist_convert.formats.megatron.grid import Grid
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.shards import Shard
from dist_convert.formats.torch.survey import files_of_headers, open_catalog
from dist_convert.models.schema import Architecture
from dist_convert.plan.content import Content, plan_content
from dist_convert.plan.plan import Plan, divide
from dist_convert.plan.steps import Step, steps_of
from dist_convert.records import DTYPE_BYTES, StoredTensor

ONE = Grid()

#: Name in the model -> shape.
Shapes = dict[str, tuple[int, ...]]

#: File, first byte, end byte.
Interval = tuple[str, int, int]


def architecture(family: str = "llama", **sizes: Any) -> Architecture:
    """A small Llama, or Mixtral where `experts` is given."""
    small: dict[str, Any] = {
        "layers": 4, "hidden": 16, "ffn": 24, "heads": 4, "query_groups": 2, "head_dim": 4, "vocab": 29,
        "padded_vocab": 32, "max_positions": 64, "norm_epsilon": 1e-5, "rope_theta": 10000.0,
    }  # fmt: skip
    return Architecture(family="mixtral" if sizes.get("experts") else family, **{**small, **sizes})


LLAMA_405B = architecture(
    layers=126, hidden=16384, ffn=53248, heads=128, query_groups=8, head_dim=128, vocab=128256, padded_vocab=129024
)
LLAMA_70B = architecture(
    layers=80, hidden=8192, ffn=28672, heads=64, query_groups=8, head_dim=128, vocab=128256, padded_vocab=129024
)
LLAMA_8B = architecture(
    layers=32, hidden=4096, ffn=14336, heads=32, query_groups=8, head_dim=128, vocab=128256, padded_vocab=128512
)
MIXTRAL_8X22B = architecture(
    layers=56, hidden=6144, ffn=16384, heads=48, query_groups=8, head_dim=128, vocab=32768, padded_vocab=32768,
    experts=8,
)  # fmt: skip
MIXTRAL_8X7B = architecture(
    layers=32, hidden=4096, ffn=14336, heads=32, query_groups=8, head_dim=128, vocab=32000, padded_vocab=32256,
    experts=8,
)  # fmt: skip

#: Model, grid, and layers of each stage: 126 layers on 16 stages are uneven.
FULL_SIZE: dict[str, tuple[Architecture, Grid, tuple[int, ...]]] = {
    "Llama-3.1-405B TP8 PP16": (LLAMA_405B, Grid(8, 16, 1, 1, 8), (7, *[8] * 14, 7)),
    "Llama-3.1-70B TP8 PP4": (LLAMA_70B, Grid(8, 4, 1, 1, 8), (20,) * 4),
    "Llama-3.1-8B TP4": (LLAMA_8B, Grid(4, 1, 1, 1, 4), (32,)),
    "Mixtral-8x22B TP2 PP4 EP8": (MIXTRAL_8X22B, Grid(2, 4, 1, 8, 2), (14,) * 4),
    "Mixtral-8x7B TP4 EP2": (MIXTRAL_8X7B, Grid(4, 1, 1, 2, 4), (32,)),
}


def directory(grid: Grid, pipeline: int, tensor: int, expert: int) -> str:
    """The name of a rank's directory."""
    name = f"mp_rank_{tensor:02d}"
    name += f"_{pipeline:03d}" if grid.pipeline > 1 else ""
    return name + (f"_{expert:03d}" if grid.expert > 1 else "")


def written_pairs(grid: Grid) -> list[tuple[int, int]]:
    """(tensor, expert) ranks of the directories of one stage, from Megatron's formulas for a rank in the stage."""
    ranks = range(lcm(grid.tensor, grid.expert_tensor * grid.expert))
    return sorted({(rank % grid.tensor, rank // grid.expert_tensor % grid.expert) for rank in ranks})


def layer_shapes(a: Architecture, grid: Grid, prefix: str) -> Shapes:
    """Dense parameters of a layer on one rank, then those of its sequential experts."""
    tp, etp = grid.tensor, grid.expert_tensor
    rows = (a.heads + 2 * a.query_groups) * a.head_dim
    shapes: Shapes = {
        "input_layernorm.weight": (a.hidden,),
        "self_attention.linear_qkv.weight": (rows // tp, a.hidden),
        "self_attention.linear_proj.weight": (a.hidden, a.heads * a.head_dim // tp),
        "pre_mlp_layernorm.weight": (a.hidden,),
    }
    if a.qkv_bias:
        shapes["self_attention.linear_qkv.bias"] = (rows // tp,)
    if a.experts:
        shapes["mlp.router.weight"] = (a.experts, a.hidden)
        for expert in range(a.experts // grid.expert):
            shapes[f"mlp.experts.local_experts.{expert}.linear_fc1.weight"] = (2 * a.ffn // etp, a.hidden)
            shapes[f"mlp.experts.local_experts.{expert}.linear_fc2.weight"] = (a.hidden, a.ffn // etp)
    else:
        shapes["mlp.linear_fc1.weight"] = (2 * a.ffn // tp, a.hidden)
        shapes["mlp.linear_fc2.weight"] = (a.hidden, a.ffn // tp)
    return {prefix + name: shape for name, shape in shapes.items()}


def chunk_shapes(a: Architecture, grid: Grid, layers: int, *, is_first: bool, is_last: bool) -> Shapes:
    """What one virtual stage of one rank holds."""
    rows = (a.padded_vocab // grid.tensor, a.hidden)
    shapes: Shapes = {"embedding.word_embeddings.weight": rows} if is_first else {}
    for layer in range(layers):
        shapes |= layer_shapes(a, grid, f"decoder.layers.{layer}.")
    if is_last:
        shapes["decoder.final_layernorm.weight"] = (a.hidden,)
        if not a.tied or grid.pipeline > 1:
            shapes["output_layer.weight"] = rows
    return shapes


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def shard(
    file: str, chunks: Iterable[Shapes], args: Mapping[str, Any], dtypes: Mapping[str, str] | None = None
) -> Shard:
    """The header of a file whose tensors follow each other with gaps; `dtypes` names those that are not in bf16."""
    listed, stored, offset_bytes = list(chunks), [], 4096
    for virtual, shapes in enumerate(listed):
        prefix = f"model{virtual}." if len(listed) > 1 else ""
        chunk = {}
        for name, shape in shapes.items():
            dtype = (dtypes or {}).get(name, "BF16")
            chunk[name] = StoredTensor(prefix + name, file, dtype, shape, row_major(shape), offset_bytes)
            offset_bytes += -(-prod(shape) * DTYPE_BYTES[dtype] // 64) * 64 + 192
        stored.append(chunk)
    opaque: tuple[dict[str, str], ...] = tuple({} for _ in stored)
    return Shard(file, offset_bytes, 4, dict(args), tuple(stored), opaque)


def training_args(a: Architecture, grid: Grid) -> dict[str, Any]:
    """The arguments that planning itself looks at."""
    return {
        "num_layers": a.layers,
        "num_experts": a.experts or None,
        "tensor_model_parallel_size": grid.tensor,
        "pipeline_model_parallel_size": grid.pipeline,
        "expert_model_parallel_size": grid.expert,
        "expert_tensor_parallel_size": grid.expert_tensor,
    }


def shards(
    a: Architecture,
    grid: Grid = ONE,
    layers: Sequence[int] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> dict[str, Shard]:
    """The headers of a whole checkpoint, by file.

    Args:
        a: the model.
        grid: its parallel sizes.
        layers: of each chunk, by virtual stage and then pipeline rank; evenly spread if None.
        dtypes: of tensors that are not in bf16, by name.
    """
    chunks = grid.pipeline * grid.virtual_pipeline
    counts = list(layers) if layers else [a.layers // chunks] * chunks
    made = {}
    for pipeline in range(grid.pipeline):
        numbers = [virtual * grid.pipeline + pipeline for virtual in range(grid.virtual_pipeline)]
        shapes = [
            chunk_shapes(a, grid, counts[number], is_first=number == 0, is_last=number == chunks - 1)
            for number in numbers
        ]
        for tensor, expert in written_pairs(grid):
            file = f"{directory(grid, pipeline, tensor, expert)}/model_optim_rng.pt"
            made[file] = shard(file, shapes, training_args(a, grid), dtypes)
    return made


def plan_to_huggingface(
    made: Mapping[str, Shard],
    a: Architecture,
    *,
    target_dtype: str | None = None,
    max_shard_size_bytes: int = 5_000_000_000,
) -> Content:
    """What a checkpoint is converted into."""
    source, left_behind = open_catalog(made, a)
    files = lay_out_files(target_tensors(source, target_dtype), max_shard_size_bytes)
    return plan_content(
        source,
        catalog_of_files(a, files),
        files,
        target_dtype=target_dtype,
        left_behind=left_behind,
    )


def plan_to_megatron(
    to_hf: Content, made: Mapping[str, Shard], a: Architecture, *, repeat_last_row: bool = True
) -> Content:
    """What a conversion of some shards makes is converted into their files."""
    target, _ = open_catalog(made, a, with_tied_copies=True)
    return plan_content(
        catalog_of_files(a, to_hf.files),
        target,
        files_of_headers(made),
        repeat_last_row=repeat_last_row,
    )


def content(
    a: Architecture, grid: Grid = ONE, layers: Sequence[int] | None = None, target_dtype: str | None = None
) -> Content:
    """What the checkpoint of `shards` is converted into, in files of 5 GB."""
    return plan_to_huggingface(shards(a, grid, layers), a, target_dtype=target_dtype)


def content_to_megatron(a: Architecture, grid: Grid = ONE, layers: Sequence[int] | None = None) -> Content:
    """The way back: what `content` makes of a checkpoint is converted into the files of that checkpoint."""
    return plan_to_megatron(content(a, grid, layers), shards(a, grid, layers), a)


def content_between(a: Architecture, grid: Grid, other: Grid) -> Content:
    """What the checkpoint of `shards` at one grid is converted into at another."""
    made = shards(a, other)
    source, target = open_catalog(shards(a, grid), a)[0], open_catalog(made, a, with_tied_copies=True)[0]
    return plan_content(source, target, files_of_headers(made), repeat_last_row=True)


def files_of(made: Content) -> tuple[str, ...]:
    """Every file of the checkpoint, sorted."""
    ends = (made.ends.source, made.ends.target)
    return tuple(sorted({file for end in ends if isinstance(end, TorchCatalog) for file, _ in end.stored}))


def everyone(made: Content, world: int) -> tuple[frozenset[str], ...]:
    """Every rank sees every file."""
    return (frozenset(files_of(made)),) * world


def steps_by_rank(plan: Plan) -> Iterator[tuple[int, int, list[Step]]]:
    """(rank, its position in its group, its steps) for every rank, in order."""
    for rank in range(len(plan.visible)):
        _, member = plan.group_of(rank)
        yield rank, member, list(steps_of(plan, rank))


def written_intervals(steps: Iterable[Step], member: int) -> Iterator[Interval]:
    """The byte ranges of target files that a member of a group writes. The parts of each must make it up."""
    for step in steps:
        for target, parts in ((write.target, write.parts) for write in step.writes if write.writer == member):
            reads = [step.reads[part.read] for part in parts]
            assert {(read.source.rows, read.dtype) for read in reads} == {(target.rows, target.dtype)}
            assert sum(part.columns for part in parts) == target.columns
            assert all(p.column + p.columns <= read.source.columns for p, read in zip(parts, reads, strict=True))
            stored = target.transposed() if target.is_transposed else target
            assert stored.columns == 1 or stored.column_stride == 1
            lines = 1 if stored.is_dense else stored.rows
            line_bytes, step_bytes = stored.size_bytes // lines, stored.row_stride * DTYPE_BYTES[stored.dtype]
            for start in range(stored.offset_bytes, stored.offset_bytes + lines * step_bytes, step_bytes)[:lines]:
                yield stored.file, start, start + line_bytes


def cover_faults(made: Content, written: Iterable[Interval]) -> list[str]:
    """Holes and overlaps of what is written in target files; tensors of zeros, and what is no tensor, count as well."""
    filled = list(written)
    for target in made.files:
        end = 0
        for tensor in sorted(target.tensors, key=lambda tensor: tensor.offset_bytes):
            filled += [(target.name, end, tensor.offset_bytes)] * (end < tensor.offset_bytes)
            end = tensor.offset_bytes + tensor.size_bytes
            filled += [(target.name, tensor.offset_bytes, end)] * (tensor.name in made.zero_tensors)
        filled += [(target.name, end, target.size_bytes)] * (end < target.size_bytes)
    faults, position = [], {file.name: 0 for file in made.files}
    for file, start, end in sorted(filled):
        if start != position[file]:
            faults.append(f"{file}: bytes {position[file]} to {start}, then one that starts there")
        position[file] = end
    cut_short = [file for file in made.files if position[file.name] != file.size_bytes]
    return faults + [f"{file.name}: ends at {position[file.name]} of {file.size_bytes}" for file in cut_short]


def plan(
    made: Content,
    visible: Sequence[frozenset[str]],
    placement: str,
    budget_bytes: int = 1_000_000_000,
    writable: Sequence[frozenset[str]] | None = None,
) -> Plan:
    return divide(made, visible, placement=placement, budget_bytes=budget_bytes, writable=writable)


def faults_of(plan: Plan) -> list[str]:
    """All that is wrong with a division: ranks in no or two groups, bytes not dealt once, readers that see nothing."""
    written: list[Interval] = []
    faults, crossing = [], dict[int, list[Step]]()
    in_groups = sorted(rank for group in plan.groups for rank in group.ranks)
    if in_groups != list(range(len(plan.visible))):
        faults.append(f"ranks in groups: {in_groups}")
    for rank, member, steps in steps_by_rank(plan):
        number, _ = plan.group_of(rank)
        written += written_intervals(steps, member)
        if crossing.setdefault(number, [s for s in steps if s.send_bytes]) != [s for s in steps if s.send_bytes]:
            faults.append(f"rank {rank} gathers otherwise than its group")
        ranks = plan.groups[number].ranks
        read = {(ranks[read.reader], read.source.file) for step in steps for read in step.reads}
        faults += [f"rank {who} does not see {file}" for who, file in read if file not in plan.visible[who]]
        put = {(ranks[write.writer], write.target.file) for step in steps for write in step.writes}
        faults += [f"rank {who} cannot write {file}" for who, file in put if file not in plan.writable[who]]
    return faults + cover_faults(plan.content, written)
