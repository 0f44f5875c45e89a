"""The parallel grid of a Megatron checkpoint: rank directories, pipeline chunks, who owns which expert, what can exist.

Integers and strings only. Facts: docs/formats.md, "Rank directories" and "Splitting over ranks".
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_convert.errors import ConversionError, MissingShard, UnsupportedModel, UsageError, raise_together
from dist_convert.models.prediction import MTP_KEY
from dist_convert.models.schema import MOST_RANKS, Architecture, is_size
from dist_convert.records import counted
from dist_convert.records import names as some

SHARD_FILE = "model_optim_rng.pt"
COPY_ONE = "copy the one that is meant to a directory of its own, complete, from where it was saved"


@dataclass(frozen=True)
class Grid:
    """Parallel sizes: tensor, pipeline, virtual pipeline, expert, expert tensor."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1

    def __str__(self) -> str:
        return f"TP{self.tensor} PP{self.pipeline} VPP{self.virtual_pipeline} EP{self.expert} ETP{self.expert_tensor}"


@dataclass(frozen=True, order=True)
class Rank:
    """A file's place in the grid. `expert_tensor` follows from `tensor` and has no part in the name."""

    pipeline: int
    tensor: int
    expert: int


def rank_directory(grid: Grid, rank: Rank) -> str:
    """The directory's name: `mp_rank_TT`, `_PPP` only if PP > 1, then `_EEE` only if EP > 1."""
    name = f"mp_rank_{rank.tensor:02d}"
    if grid.pipeline > 1:
        name += f"_{rank.pipeline:03d}"
    if grid.expert > 1:
        name += f"_{rank.expert:03d}"
    return name


def is_rank_directory(name: str) -> bool:
    """Whether a directory's name is of the form `mp_rank_N`, `mp_rank_N_N` or `mp_rank_N_N_N`."""
    prefix, rank, *numbers = name.split("_", 2) if name.count("_") >= 2 else ("", "", "")
    parts = numbers[0].split("_") if numbers else []
    return (prefix, rank) == ("mp", "rank") and 1 <= len(parts) <= 3 and all(part.isdecimal() for part in parts)


def rank_numbers(file: str) -> tuple[int, ...]:
    """The numbers in the name of the rank directory in which a file lies."""
    return tuple(map(int, file.partition("/")[0].split("_")[2:]))


def sizes_of_directories(files: Iterable[str], args: Mapping[str, Any]) -> dict[str, int]:
    """The parallel sizes that args lack and the names of all rank directories tell, by their arguments.

    Of two numbers the second one is the pipeline's, but where experts are divided.
    """
    ranks = [rank_numbers(file) for file in files]
    if len(set(map(len, ranks))) > 1:
        return {}  # of several grids, which is told where the files are counted
    has_pipeline = len(ranks[0]) > 2 or (args.get("expert_model_parallel_size") or 1) == 1
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size")[: 1 + has_pipeline]
    told = {name: max(numbers) + 1 for name, numbers in zip(names, zip(*ranks, strict=True), strict=False)}
    return {name: size for name, size in told.items() if args.get(name) is None}


def grid_from_args(args: Mapping[str, Any], chunks: int, *, imported_experts: bool) -> Grid:
    """The grid that training ran with.

    Args:
        args: the training arguments.
        chunks: models found in each file, the virtual pipeline size.
        imported_experts: Habana's importer made the checkpoint; it splits experts over all tensor parallel ranks and
            leaves expert_tensor_parallel_size at 1.

    Raises:
        UnsupportedModel: a grid whose files cannot hold the whole model, or are split in a way that is not read.
    """
    tensor = args.get("tensor_model_parallel_size") or 1
    expert = args.get("expert_model_parallel_size") or 1
    expert_tensor = args.get("expert_tensor_parallel_size") or tensor
    if imported_experts or not args.get("num_experts"):
        expert_tensor = tensor
    grid = Grid(tensor, args.get("pipeline_model_parallel_size") or 1, chunks, expert, expert_tensor)
    sizes = (tensor, grid.pipeline, expert, expert_tensor)
    if not all(is_size(size, MOST_RANKS) for size in sizes) or tensor * grid.pipeline * expert > MOST_RANKS:
        raise UnsupportedModel(
            "a parallel grid of impossible sizes",
            expected=f"whole numbers, and at most {MOST_RANKS} ranks",
            found=str(grid)[:80],
            remedy="the args are damaged; copy the checkpoint again from where it was saved",
        )
    if tensor % expert_tensor:
        raise UnsupportedModel(
            "several expert tensor parallel ranks of this grid shared one file name; only one of them was kept",
            expected="expert_tensor_parallel_size divides tensor_model_parallel_size",
            found=str(grid),
            remedy="the lost expert shards are in no file; save the checkpoint again with expert_tensor <= tensor",
        )
    # Versions that know expert_tensor_parallel_size parse --moe-extended-tp and ignore it.
    extended = args.get("moe_extended_tp") and "expert_tensor_parallel_size" not in args
    if extended and tensor * expert > 1 and args.get("num_experts"):
        raise UnsupportedModel(
            "experts were split over tensor x expert parallel ranks (--moe-extended-tp)",
            expected="moe_extended_tp false",
            found="true",
            remedy="load and save the checkpoint without --moe-extended-tp",
        )
    return grid


@dataclass(frozen=True)
class ShardFiles:
    """The rank files that are there, and which of them hold what.

    Attributes:
        dense: (pipeline, tensor) -> files with that shard of the dense parameters; equal copies, sorted.
        experts: (pipeline, expert, expert_tensor) -> files with that shard of the experts; equal copies, sorted.
    """

    dense: Mapping[tuple[int, int], tuple[str, ...]]
    experts: Mapping[tuple[int, int, int], tuple[str, ...]]


def find_shards(grid: Grid, present: Iterable[str]) -> ShardFiles:
    """Place the rank directories that are present in the grid.

    Args:
        grid: from the args.
        present: names of rank directories that hold a `model_optim_rng.pt`.

    Raises:
        MissingShard: a directory that the grid does not name, or a shard that no directory holds.
    """
    names = set(present)
    missing = missing_directories(grid, names)
    foreign = sorted(names - {rank_directory(grid, rank) for rank in grid_ranks(grid)})
    if foreign:
        raise MissingShard(
            "rank directories that the checkpoint's own args do not name",
            expected=f"the directories of {grid}" + (f", of which are missing: {some(missing, 6)}" if missing else ""),
            found=some(foreign, 6),
            remedy=f"two checkpoints may share this directory: {COPY_ONE}",
        )
    if missing:
        remedy = "copy the missing directories beside the others"
        if grid.expert_tensor < grid.tensor:
            remedy += (
                "; before Megatron-Core 0.18 a run with TP larger than EP x ETP never wrote some tensor parallel "
                "shards: then save again with a newer Megatron-Core"
            )
        raise MissingShard(
            f"{counted(len(missing), 'rank directory', 'rank directories')} of {grid} missing",
            expected=f"{SHARD_FILE} in {some(missing, 6)}",
            found=some(sorted(names), 6) or "none",
            remedy=remedy,
        )
    dense, experts = _holders(grid, names)
    return ShardFiles(dense, experts)


def grid_ranks(grid: Grid) -> list[Rank]:
    """Every rank that the grid can name; with ETP < TP training writes only some of them."""
    return [Rank(p, t, e) for p in range(grid.pipeline) for t in range(grid.tensor) for e in range(grid.expert)]


def written_ranks(grid: Grid) -> list[Rank]:
    """The ranks whose files exist: with ETP < TP only some pairs of tensor and expert rank occur in a stage."""
    in_stage = math.lcm(grid.tensor, grid.expert_tensor * grid.expert)
    pairs = dict.fromkeys((r % grid.tensor, r // grid.expert_tensor % grid.expert) for r in range(in_stage))
    return [Rank(pipeline, tensor, expert) for pipeline in range(grid.pipeline) for tensor, expert in sorted(pairs)]


def _holders(
    grid: Grid, names: set[str]
) -> tuple[dict[tuple[int, int], tuple[str, ...]], dict[tuple[int, int, int], tuple[str, ...]]]:
    """Files by dense shard and by expert shard; the expert tensor rank is the tensor rank modulo ETP."""
    dense: dict[tuple[int, int], tuple[str, ...]] = {}
    experts: dict[tuple[int, int, int], tuple[str, ...]] = {}
    for rank in grid_ranks(grid):
        name = rank_directory(grid, rank)
        if name in names:
            file = f"{name}/{SHARD_FILE}"
            shard = (rank.pipeline, rank.tensor)
            expert_shard = (rank.pipeline, rank.expert, rank.tensor % grid.expert_tensor)
            dense[shard] = (*dense.get(shard, ()), file)
            experts[expert_shard] = (*experts.get(expert_shard, ()), file)
    return dense, experts


def missing_directories(grid: Grid, names: set[str]) -> list[str]:
    """Rank directories that are absent and whose shards no other directory holds."""
    dense, experts = _holders(grid, names)
    return [
        rank_directory(grid, rank)
        for rank in grid_ranks(grid)
        if (rank.pipeline, rank.tensor) not in dense
        or (rank.pipeline, rank.expert, rank.tensor % grid.expert_tensor) not in experts
    ]


@dataclass(frozen=True)
class Chunk:
    """A run of layers that one virtual pipeline stage holds.

    Attributes:
        pipeline: rank, the `_PPP` of the directory.
        virtual: number of `model{virtual}` in the file.
        first_layer: global number of its layer 0.
        layers: how many it holds, possibly none.
    """

    pipeline: int
    virtual: int
    first_layer: int
    layers: int


def place_chunks(grid: Grid, layers_of: Mapping[tuple[int, int], int]) -> tuple[Chunk, ...]:
    """Number the layers over all chunks, in the order in which a token meets them: by virtual stage, then pipeline.

    Args:
        grid: the parallel sizes.
        layers_of: (pipeline, virtual) -> layers counted in that chunk's keys. Counting serves even and uneven stages,
            embeddings that stand in for a layer, and explicit layouts alike.
    """
    chunks, first_layer = [], 0
    for virtual in range(grid.virtual_pipeline):
        for pipeline in range(grid.pipeline):
            layers = layers_of[pipeline, virtual]
            chunks.append(Chunk(pipeline, virtual, first_layer, layers))
            first_layer += layers
    return tuple(chunks)


def layer_chunks(chunks: Sequence[Chunk]) -> tuple[Chunk, ...]:
    """For each layer, the chunk that holds it."""
    return tuple(chunk for chunk in chunks for _ in range(chunk.layers))


def chunk_of_mtp(chunks: Sequence[Chunk], layout: object) -> Chunk:
    """The chunk that holds the layers of multi-token prediction: the one where a layout has them, else the last."""
    stages = _parse(layout, []) if isinstance(layout, str) else []
    return next((chunk for chunk, stage in zip(chunks, stages, strict=False) if "m" in stage), chunks[-1])


def grid_of_args(args: Mapping[str, Any], layers: int) -> tuple[Grid, tuple[Chunk, ...]]:
    """The grid that training ran with and its chunks, as its args describe them, where no file shows them.

    Args:
        args: the training arguments.
        layers: of the model.

    Raises:
        UnsupportedModel: the args describe no pipeline of that many layers.
    """
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    tensor, pipeline, expert = (_count(args, name) or 1 for name in names)
    expert_tensor = _count(args, "expert_tensor_parallel_size") if args.get("num_experts") else None
    layout = args.get("pipeline_model_parallel_layout")
    layout = layout if isinstance(layout, str) else None
    first, last = (_count(args, f"decoder_{which}_pipeline_num_layers") for which in ("first", "last"))
    virtual = _count(args, "virtual_pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank") or 1
    with_embedding, with_loss = (bool(args.get(f"account_for_{what}_in_pipeline_split")) for what in _COUNTED)
    try:
        if layout:
            virtual = max(1, layout_stages(layout) // pipeline)
        elif each := _count(args, "num_layers_per_virtual_pipeline_stage"):
            virtual = virtual_stages(layers + with_embedding + with_loss, pipeline, each)
        counted, mtp = layers + with_embedding + with_loss, _count(args, MTP_KEY.arg) or 0
        stages = stage_layers(counted, pipeline, virtual, first=first, last=last, layout=layout, mtp=mtp)
    except UsageError as error:
        raise UnsupportedModel(
            "the args describe no pipeline of this model",
            expected=f"{layers} layers in {pipeline} stages",
            found=str(error),
            remedy="say how the target's pipeline is cut: --target-pipeline-parallel-size, and the flags of its layers",
        ) from error
    grid = Grid(tensor, pipeline, virtual, expert, expert_tensor or tensor)
    counts = {(p, v): stages[v][p] for v in range(virtual) for p in range(pipeline)}
    counts[0, 0] -= with_embedding
    counts[pipeline - 1, virtual - 1] -= with_loss
    return grid, place_chunks(grid, counts)


_COUNTED = ("embedding", "loss")


def _count(args: Mapping[str, Any], *names: str) -> int | None:
    """The first of some arguments that is a number of something."""
    found = (args.get(name) for name in names)
    return next((value for value in found if type(value) is int and 0 < value <= MOST_RANKS), None)


def files_of_nodes(grid: Grid, nodes: int, ranks_per_node: int) -> tuple[frozenset[str], ...]:
    """For each node, the rank files that its training processes load.

    Training numbers its processes node by node, and places them in Megatron's default order: tensor parallel first,
    then expert and data parallel, pipeline last (docs/formats.md, "Rank directories").

    Args:
        grid: of the target.
        nodes: of training, the same as those of the conversion.
        ranks_per_node: training processes on each.

    Raises:
        UsageError: so many processes cannot hold whole replicas of the model.
    """
    processes = nodes * ranks_per_node
    in_stage = math.lcm(grid.tensor, grid.expert_tensor * grid.expert)
    if processes % (in_stage * grid.pipeline):
        raise UsageError(
            f"{nodes} nodes with {ranks_per_node} training processes each do not hold whole replicas of {grid}",
            expected=f"a multiple of {in_stage * grid.pipeline} processes",
            found=f"{processes} processes",
            remedy="give the training processes of each node with --target-ranks-per-node, and start the conversion "
            "on the nodes that train",
        )
    per_stage = processes // grid.pipeline
    listed = [
        Rank(number // per_stage, number % grid.tensor, number // grid.expert_tensor % grid.expert)
        for number in range(processes)
    ]
    return tuple(
        frozenset(
            f"{rank_directory(grid, rank)}/{SHARD_FILE}"
            for rank in listed[node * ranks_per_node : (node + 1) * ranks_per_node]
        )
        for node in range(nodes)
    )


def check_rank_order(args: Mapping[str, Any] | None) -> None:
    """Refuse training arguments that number processes in another order than `files_of_nodes` does.

    Raises:
        UsageError: pipeline ranks are numbered before data parallel ones.
    """
    if args is not None and args.get("use_tp_pp_dp_mapping"):
        raise UsageError(
            "training with use_tp_pp_dp_mapping puts other rank directories on a node",
            expected="Megatron's default order of ranks",
            found="use_tp_pp_dp_mapping in the margs file",
            remedy="set it to false there, or convert to a shared directory and copy the directories to their nodes",
        )


def files_of_places(
    grid: Grid, place_of_rank: Sequence[int], node_of_rank: Sequence[int], ranks_per_node: int
) -> tuple[frozenset[str], ...]:
    """For each place, the rank files of all its nodes.

    Raises:
        UsageError: see `files_of_nodes`.
    """
    of_nodes = files_of_nodes(grid, max(node_of_rank) + 1, ranks_per_node)
    pairs = list(zip(place_of_rank, node_of_rank, strict=True))
    return tuple(
        frozenset[str]().union(*(of_nodes[node] for of_rank, node in pairs if of_rank == place))
        for place in range(max(place_of_rank) + 1)
    )


#: Letters of a layout: embedding, transformer layer, loss (head); `|` ends a stage.
_LETTERS = "EtmL|"
#: Far above any real model; a repeat count is a request for memory.
_LONGEST_LAYOUT = 100_000
_FIRST, _LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
_LAYOUT = "--pipeline-model-parallel-layout"


def check_target(
    architecture: Architecture,
    grid: Grid,
    *,
    first: int | None = None,
    last: int | None = None,
    layout: str | None = None,
    kept: tuple[tuple[int, ...], ...] | None = None,
) -> None:
    """Refuse a target that cannot exist.

    Args:
        architecture: the model.
        grid: parallel sizes of the target.
        first, last, layout: see `stage_layers`.
        kept: the layers of each chunk where a source's stay as they are, which needs no other arguments.

    Raises:
        UsageError: with the reason; all reasons are reported together.
    """
    a = architecture
    if min(grid.tensor, grid.pipeline, grid.virtual_pipeline, grid.expert, grid.expert_tensor) < 1:
        raise UsageError("parallel sizes are at least 1", found=str(grid))
    divided = [("the attention heads", a.heads, "tensor", grid.tensor)]
    divided += [("the rows of the padded vocabulary", a.padded_vocab, "tensor", grid.tensor)]
    if grid.tensor % a.query_groups:
        divided += [("the query groups", a.query_groups, "tensor", grid.tensor)]
    else:  # fewer groups than ranks divide them instead, and ranks share the rows of a group
        qkv_rows = (a.heads + 2 * a.query_groups) * a.head_dim
        divided += [("the rows of queries, keys and values", qkv_rows, "tensor", grid.tensor)]
    if a.experts:
        divided += [("the experts", a.experts, "expert", grid.expert)]
        divided += [("the columns of an expert", a.expert_width, "expert-tensor", grid.expert_tensor)]
    widths = {"the columns of the MLP": 0 if a.experts and not a.is_mixed else a.ffn}
    widths["the columns of the shared experts"] = a.fact("shared_ffn")
    divided += [(what, width, "tensor", grid.tensor) for what, width in widths.items() if width]
    allowed = {  # every divisor of these is accepted: a remedy must not lead into the next refusal
        "tensor": math.gcd(a.heads, a.query_groups, *widths.values()),  # the vocabulary is padded for any
        "expert": a.experts,
        "expert-tensor": math.gcd(a.expert_width, grid.tensor),
    }
    problems: list[ConversionError] = [
        UsageError(
            f"{what} cannot be divided over the {axis} parallel ranks",
            expected=f"a multiple of {ranks}",
            found=size,
            remedy=f"choose a --target-{axis}-parallel-size that divides {allowed[axis]}",
        )
        for what, size, axis, ranks in divided
        if size % ranks
    ]
    if a.experts and grid.tensor % grid.expert_tensor:
        problems.append(
            UsageError(
                "two expert tensor parallel ranks would share the name of one file",
                expected=f"--target-expert-tensor-parallel-size divides the tensor parallel size {grid.tensor}",
                found=grid.expert_tensor,
            )
        )
    if a.experts and a.linear_bias and grid.expert_tensor > 1:
        problems.append(
            UsageError(
                "Megatron does not cut experts that have biases",
                expected="--target-expert-tensor-parallel-size 1",
                found=grid.expert_tensor,
            )
        )
    if not a.experts and grid.expert > 1:
        problems.append(
            UsageError(
                "a model without experts has no expert parallel ranks",
                expected=1,
                found=grid.expert,
                remedy="leave out --target-expert-parallel-size",
            )
        )
    mtp = a.fact(MTP_KEY.field)
    if mtp and a.tied and grid.pipeline > 1:
        problems.append(
            UsageError(
                "Megatron-Core loads no layers of multi-token prediction beside tied embeddings from several stages",
                expected="--target-pipeline-parallel-size 1, or --drop-mtp",
                found=grid.pipeline,
            )
        )
    try:
        if kept is None:
            stage_layers(a.layers, grid.pipeline, grid.virtual_pipeline, first=first, last=last, layout=layout, mtp=mtp)
    except UsageError as problem:
        problems.append(problem)
    raise_together(problems)


def notes_on_target(architecture: Architecture, grid: Grid) -> tuple[str, ...]:
    """What the user should know about a target that can exist: one sentence each."""
    if architecture.query_groups >= grid.tensor:
        return ()
    return (
        f"{architecture.query_groups} query groups on {grid.tensor} tensor parallel ranks: only Megatron-Core 0.16 and "
        "newer load such a checkpoint",
    )


def stage_layers(
    layers: int,
    pipeline: int,
    virtual: int,
    *,
    first: int | None,
    last: int | None,
    layout: str | None,
    mtp: int = 0,
) -> tuple[tuple[int, ...], ...]:
    """Layers of each chunk, by virtual stage, then by pipeline rank: the order in which a token meets them.

    Args:
        layers: of the model.
        pipeline, virtual: parallel sizes; 1 is none.
        first, last: layers of the first and the last pipeline rank over all its virtual stages; the other ranks share
            the rest evenly. None: the same as the others.
        layout: a string such as `Et*3|(tt|)*2tL`, instead of `first` and `last`.
        mtp: layers of multi-token prediction, which only a layout names (`m`).

    Raises:
        UsageError: no such pipeline exists; its text gives all reasons.
    """
    reasons: list[str] = []
    if min(pipeline, virtual) < 1:
        reasons.append(f"parallel sizes are at least 1, not {pipeline} and {virtual}")
    elif layout is not None:
        if (first, last) != (None, None):
            reasons.append(f"{_LAYOUT} excludes {_FIRST} and {_LAST}")
        stages = _parse(layout, reasons)
        if not reasons:
            reasons += _wrong_layout(stages, layers, mtp, pipeline, virtual)
        if not reasons:
            counts = [stage.count("t") for stage in stages]
            return tuple(tuple(counts[v * pipeline : (v + 1) * pipeline]) for v in range(virtual))
    else:
        ranks = _ranks(layers, pipeline, virtual, first, last, reasons)
        if not reasons:
            return (tuple(count // virtual for count in ranks),) * virtual
    raise UsageError(
        f"{counted(layers, 'layer')} cannot be divided over {counted(pipeline, 'pipeline rank')}"
        + (f" with {virtual} virtual stages each" if virtual != 1 else ""),
        found="; ".join(reasons),
        remedy="choose sizes that divide the layers, or say where they go: "
        f"{_FIRST} and {_LAST}, or {_LAYOUT}, e.g. Ett|(ttt|)*2ttL",
    )


def layout_stages(layout: str) -> int:
    """How many stages a layout has: the pipeline size times the virtual one.

    Raises:
        UsageError: it cannot be read.
    """
    reasons: list[str] = []
    stages = _parse(layout, reasons)
    if reasons:
        raise UsageError(f"{_LAYOUT} cannot be read", found="; ".join(reasons), remedy="e.g. Ett|(ttt|)*2ttL")
    return len(stages)


def virtual_stages(layers: int, pipeline: int, layers_each: int) -> int:
    """How many virtual stages of so many layers each pipeline rank has.

    Raises:
        UsageError: they do not come out even.
    """
    if layers % (pipeline * layers_each):
        ranks = counted(pipeline, "pipeline rank")
        raise UsageError(
            f"{counted(layers, 'layer')} cannot be divided over {ranks} in virtual stages of {layers_each}",
            expected=f"a multiple of {pipeline * layers_each} layers",
            found=layers,
            remedy="choose another --num-layers-per-virtual-pipeline-stage",
        )
    return layers // (pipeline * layers_each)


def _ranks(
    layers: int, pipeline: int, virtual: int, first: int | None, last: int | None, reasons: list[str]
) -> list[int]:
    """Layers of each pipeline rank; every reason against them is added to `reasons`."""
    if virtual > 1 and pipeline == 1:
        reasons.append("virtual stages need at least 2 pipeline ranks")
    if pipeline == 1 and (first, last) != (None, None):
        reasons.append(f"{_FIRST} and {_LAST} need at least 2 pipeline ranks")
    given = [count for count in (first, last) if count is not None]
    if any(count < 1 for count in given):
        reasons.append(f"{_FIRST} and {_LAST} are at least 1")
    rest, others = layers - sum(given), pipeline - len(given)
    if rest < 0:
        reasons.append(f"the first and last ranks alone would hold {sum(given)} layers")
    elif others == 0 and rest:
        reasons.append(f"{rest} layers are left and no rank between the first and the last")
    elif others > 0 and rest % others:
        remain = " remaining" if given else ""
        reasons.append(f"{rest}{remain} layers are not divisible by {others}{remain} pipeline ranks")
    elif others > 0 and rest == 0:
        reasons.append(f"no layers are left for {others} of the pipeline ranks")
    # With an uneven rest the shares mean nothing; what was given is checked all the same.
    share = rest // others if others > 0 and rest % others == 0 else None
    for count in dict.fromkeys((first, share, last)):
        if count is not None and virtual > 1 and count % virtual:
            reasons.append(f"the {count} layers of a pipeline rank are not divisible by {virtual} virtual stages")
    if reasons:
        return []
    return [count for count in (first, *[share] * max(0, others), last) if count is not None]


def _parse(layout: str, reasons: list[str]) -> list[str]:
    """The letters of each stage. Commas mean nothing; `x*n` and `(...)*n` repeat; parentheses do not nest."""
    letters = layout.replace(",", "")
    if len(layout) > _LONGEST_LAYOUT:
        reasons.append(f"the layout has more than {_LONGEST_LAYOUT} letters")
        return []
    for pattern in (r"\(([^)]{1,1000})\)\*(\d{1,6})", r"(.)\*(\d{1,6})"):
        length = len(letters) + sum(len(what) * int(count) for what, count in re.findall(pattern, letters))
        if length > _LONGEST_LAYOUT:
            reasons.append(f"the layout describes more than {_LONGEST_LAYOUT} letters")
            return []
        letters = re.sub(pattern, lambda match: match[1] * int(match[2]), letters)
    unknown = sorted(set(letters) - set(_LETTERS))
    if unknown:
        reasons.append(f"the layout has {' '.join(map(repr, unknown))} beside E, t, m, L, |, (...)*n and t*n")
    return letters.split("|")


def _wrong_layout(stages: Sequence[str], layers: int, mtp: int, pipeline: int, virtual: int) -> list[str]:
    """Every reason why a layout does not suit the model and the parallel sizes."""
    reasons = []
    if len(stages) != pipeline * virtual:
        reasons.append(f"the layout has {len(stages)} stages, the parallel sizes {pipeline * virtual}")
    letters = "".join(stages)
    if letters.count("t") != layers:
        reasons.append(f"the layout has {letters.count('t')} layers (t), the model {layers}")
    if letters.count("m") != mtp:
        reasons.append(f"the layout has {letters.count('m')} layers of multi-token prediction (m), the model {mtp}")
    elif mtp and ("t" in letters[letters.index("m") :] or sum("m" in stage for stage in stages) > 1):
        reasons.append("all layers of multi-token prediction (m) are in one stage, behind the last layer (t)")
    elif mtp and not any("m" in stage for stage in stages[-pipeline:]):
        reasons.append("layers of multi-token prediction (m) are in the last virtual stage of a pipeline rank")
    if letters.count("E") != 1 or not stages[0].startswith("E"):
        reasons.append("the layout needs one E, at the beginning of its first stage")
    if letters.count("L") != 1 or not stages[-1].endswith("L"):
        reasons.append("the layout needs one L, at the end of its last stage")
    return reasons
