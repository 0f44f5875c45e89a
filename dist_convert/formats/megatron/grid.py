"""The parallel grid of a Megatron checkpoint: rank directories, pipeline chunks, who owns which expert, what can exist.

Integers and strings only. Facts: docs/formats.md, "Rank directories" and "Splitting over ranks".
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dist_convert.errors import MissingShard, UnsupportedModel, UsageError, raise_together
from dist_convert.models.blocks import MTP_KEY
from dist_convert.models.schema import MOST_RANKS, Architecture, is_size
from dist_convert.records import JsonObject, counted, local_name
from dist_convert.records import names as some

SHARD_FILE = "model_optim_rng.pt"
#: The arguments of a grid's sizes, but for the virtual pipeline's.
SIZES = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)  # fmt: skip
COPY_ONE = "copy the right one, complete, from where it was saved to a directory of its own"


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
    return re.fullmatch(r"mp_rank(_\d+){1,3}", name) is not None


def rank_numbers(file: str) -> tuple[int, ...]:
    """The numbers in the name of the rank directory in which a file lies."""
    return tuple(map(int, file.partition("/")[0].split("_")[2:]))


def sizes_of_directories(files: Iterable[str], args: JsonObject) -> dict[str, int]:
    """The parallel sizes that args lack and the names of all rank directories tell, by their arguments.

    Of two numbers the second one is the pipeline's, but where experts are divided.
    """
    ranks = [rank_numbers(file) for file in files]
    if len(set(map(len, ranks))) > 1:
        return {}  # of several grids, which is told where the files are counted
    has_pipeline = len(ranks[0]) > 2 or (args.get("expert_model_parallel_size") or 1) == 1
    names = SIZES[: 1 + has_pipeline]
    told = {name: max(numbers) + 1 for name, numbers in zip(names, zip(*ranks, strict=True), strict=False)}
    return {name: size for name, size in told.items() if args.get(name) is None}


def grid_from_args(args: JsonObject, chunks: int, *, imported_experts: bool) -> Grid:
    """The grid that training ran with; `chunks` are the models found in each file, the virtual pipeline size.

    `imported_experts`: Habana's importer made the checkpoint; it splits experts over all tensor parallel ranks and
    leaves expert_tensor_parallel_size at 1.

    Raises:
        UnsupportedModel: a grid whose files cannot hold the whole model, or are split in a way that is not read.
    """
    sizes = {name: args.get(name) or 1 for name in SIZES}
    if imported_experts or not args.get("num_experts") or not args.get("expert_tensor_parallel_size"):
        sizes["expert_tensor_parallel_size"] = sizes["tensor_model_parallel_size"]
    tensor, pipeline, expert, expert_tensor = sizes.values()
    wrong = {name: size for name, size in sizes.items() if not is_size(size, MOST_RANKS)}
    if wrong or tensor * pipeline * expert > MOST_RANKS:
        raise UnsupportedModel(
            "a parallel grid of impossible sizes",
            expected=f"whole numbers, and at most {MOST_RANKS} ranks",
            found=", ".join(f"{name} {str(size)[:40]}" for name, size in (wrong or sizes).items()),
            remedy="the args are damaged; copy the checkpoint again from where it was saved",
        )
    if tensor % expert_tensor:
        what = "several expert tensor parallel ranks of this grid shared one file name; only one of them was kept"
        expected = "expert_tensor_parallel_size divides tensor_model_parallel_size"
        remedy = "the lost expert shards are in no file; save the checkpoint again with expert_tensor <= tensor"
        raise UnsupportedModel(what, expected=expected, found=f"{expert_tensor} and {tensor}", remedy=remedy)
    # Versions that know expert_tensor_parallel_size parse --moe-extended-tp and ignore it.
    extended = args.get("moe_extended_tp") and "expert_tensor_parallel_size" not in args
    if extended and tensor * expert > 1 and args.get("num_experts"):
        what = "experts were split over tensor x expert parallel ranks (--moe-extended-tp)"
        remedy = "load and save the checkpoint without --moe-extended-tp"
        raise UnsupportedModel(what, expected="moe_extended_tp false", found="true", remedy=remedy)
    return Grid(tensor, pipeline, chunks, expert, expert_tensor)


#: (pipeline, expert rank or None for dense parameters, tensor or expert tensor rank).
HeldShard = tuple[int, int | None, int]
#: The files that hold each shard; equal copies, in the order of their ranks.
ShardFiles = Mapping[HeldShard, tuple[str, ...]]


def held_by(grid: Grid, rank: Rank) -> tuple[HeldShard, HeldShard]:
    """The dense shard and the expert shard in a file; the expert tensor rank is the tensor rank modulo ETP."""
    return (rank.pipeline, None, rank.tensor), (rank.pipeline, rank.expert, rank.tensor % grid.expert_tensor)


def holders(grid: Grid, files_of: Mapping[Rank, Sequence[str]]) -> ShardFiles:
    """The files of each shard, of those of some ranks."""
    found: dict[HeldShard, tuple[str, ...]] = {}
    for rank, files in files_of.items():
        for shard in held_by(grid, rank):
            found[shard] = (*found.get(shard, ()), *files)
    return found


def find_shards(grid: Grid, files: Iterable[str]) -> ShardFiles:
    """Place the files, each rank's `model_optim_rng.pt`, in the grid; of one on several disks, all are equal copies.

    Raises:
        MissingShard: a directory that the grid does not name, or a shard that no directory holds.
    """
    at: dict[str, list[str]] = {}
    for file in sorted(files):
        at.setdefault(local_name(file).partition("/")[0], []).append(file)
    missing, foreign = missing_directories(grid, at), foreign_directories(grid, at)
    if foreign:
        what = "rank directories that the checkpoint's own args do not name"
        remedy = "two checkpoints may share this directory"
        expected = f"the directories of {grid}" + (f"; missing: {some(missing, 6)}" if missing else "")
        raise MissingShard(what, expected=expected, found=some(foreign, 6), remedy=f"{remedy}: {COPY_ONE}")
    if missing:
        remedy = "copy the missing directories beside the others"
        if grid.expert_tensor < grid.tensor:
            remedy += (
                "; Megatron-Core before 0.18 does not write all tensor parallel shards if TP is larger than "
                "EP x ETP: then save again with a newer version"
            )
        what = f"{counted(len(missing), 'rank directory', 'rank directories')} of {grid} missing"
        found = some(sorted(at), 6)
        raise MissingShard(what, expected=f"{SHARD_FILE} in {some(missing, 6)}", found=found or "none", remedy=remedy)
    return holders(grid, _ranks_at(grid, at))


def grid_ranks(grid: Grid) -> list[Rank]:
    """Every rank that the grid can name; with ETP < TP training writes only some of them."""
    return [Rank(p, t, e) for p in range(grid.pipeline) for t in range(grid.tensor) for e in range(grid.expert)]


def written_ranks(grid: Grid) -> list[Rank]:
    """The ranks whose files exist: with ETP < TP only some pairs of tensor and expert rank occur in a stage."""
    in_stage = math.lcm(grid.tensor, grid.expert_tensor * grid.expert)
    pairs = dict.fromkeys((r % grid.tensor, r // grid.expert_tensor % grid.expert) for r in range(in_stage))
    return [Rank(pipeline, tensor, expert) for pipeline in range(grid.pipeline) for tensor, expert in sorted(pairs)]


def _ranks_at(grid: Grid, at: Mapping[str, Sequence[str]]) -> dict[Rank, Sequence[str]]:
    """The ranks of those directories that are there, with what is `at` each."""
    named = ((rank, rank_directory(grid, rank)) for rank in grid_ranks(grid))
    return {rank: at[name] for rank, name in named if name in at}


def missing_directories(grid: Grid, names: Iterable[str]) -> list[str]:
    """Rank directories that are absent and whose shards no other directory holds."""
    held = holders(grid, _ranks_at(grid, {name: (name,) for name in names}))
    return [rank_directory(grid, r) for r in grid_ranks(grid) if any(s not in held for s in held_by(grid, r))]


def foreign_directories(grid: Grid, names: Iterable[str]) -> list[str]:
    """Rank directories that the grid does not name."""
    return sorted(set(names) - {rank_directory(grid, rank) for rank in grid_ranks(grid)})


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


def place_chunks(stages: Sequence[Sequence[int]]) -> tuple[Chunk, ...]:
    """Number the layers of each chunk, by virtual stage, then by pipeline rank: the order in which tokens meet them."""
    chunks, first_layer = [], 0
    for virtual, stage in enumerate(stages):
        for pipeline, layers in enumerate(stage):
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


def grid_of_args(args: JsonObject, layers: int) -> tuple[Grid, tuple[Chunk, ...]]:
    """The grid that training ran with and its chunks, as its args describe them, where no file shows them.

    Raises:
        UnsupportedModel: the args describe no pipeline of that many layers.
    """
    tensor, pipeline, expert, expert_tensor = (count_of(args, name) or 1 for name in SIZES)
    if not args.get("num_experts") or not count_of(args, SIZES[3]):
        expert_tensor = tensor
    try:
        stages = stage_layers(layers, pipeline, cut_of_args(args), mtp=count_of(args, MTP_KEY.arg) or 0)
    except UsageError as error:
        what, expected = "the pipeline in the args does not fit the model", f"{layers} layers in {pipeline} stages"
        raise UnsupportedModel(what, expected=expected, found=error, remedy=SAY_STAGES) from error
    return Grid(tensor, pipeline, len(stages), expert, expert_tensor), place_chunks(stages)


def count_of(args: JsonObject | None, *names: str) -> int | None:
    """The first of some arguments that is a number of something."""
    found = ((args or {}).get(name) for name in names)
    return next((value for value in found if type(value) is int and 0 < value <= MOST_RANKS), None)


def files_of_disks(
    grid: Grid, disk_of_rank: Sequence[int], node_of_rank: Sequence[int], ranks_per_node: int, args: JsonObject | None
) -> tuple[frozenset[str], ...]:
    """For each disk, the rank files that the training processes of all its nodes load.

    Training numbers its processes node by node, and places them in Megatron's default order: tensor parallel first,
    then expert and data parallel, pipeline last (docs/formats.md, "Rank directories").

    Args:
        grid, args: of the target, and of its training if there are any.
        disk_of_rank, node_of_rank: where each rank of the conversion writes, and runs; training has the same nodes.
        ranks_per_node: training processes on each.

    Raises:
        UsageError: so many processes cannot hold whole replicas of the model, or they are numbered in another order.
    """
    if args is not None and args.get("use_tp_pp_dp_mapping"):
        what = "training with use_tp_pp_dp_mapping puts other rank directories on a node"
        remedy = "set it to false there, or convert to a shared directory and copy the directories to their nodes"
        raise UsageError(what, expected="Megatron's default order of ranks", remedy=remedy)
    nodes = max(node_of_rank) + 1
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
    of_disks: list[set[str]] = [set() for _ in range(max(disk_of_rank) + 1)]
    for disk, node in set(zip(disk_of_rank, node_of_rank, strict=True)):
        for number in range(node * ranks_per_node, (node + 1) * ranks_per_node):
            pipeline = number // (processes // grid.pipeline)
            rank = Rank(pipeline, number % grid.tensor, number // grid.expert_tensor % grid.expert)
            of_disks[disk].add(f"{rank_directory(grid, rank)}/{SHARD_FILE}")
    return tuple(map(frozenset, of_disks))


def check_target(architecture: Architecture, grid: Grid, expert_layout: str = "sequential") -> None:
    """Refuse a target that cannot exist, whatever its pipeline is like (see `stage_layers`).

    Raises:
        UsageError: with the reason; all reasons are reported together.
    """
    a = architecture
    groups = ("the query groups", a.query_groups, "tensor")
    if grid.tensor % a.query_groups == 0:  # they divide the ranks instead, which share the rows of a group
        groups = ("the rows of queries, keys and values", (a.heads + 2 * a.query_groups) * a.head_dim, "tensor")
    ffn, shared_ffn = 0 if a.experts and not a.is_mixed else a.ffn, a.fact("shared_ffn")
    experts, expert_width = a.experts, a.expert_width if a.experts else 0
    divided = (
        ("the attention heads", a.heads, "tensor"),
        ("the rows of the padded vocabulary", a.padded_vocab, "tensor"),
        groups,
        ("the experts", experts, "expert"),
        ("the columns of an expert", expert_width, "expert-tensor"),
        ("the columns of the MLP", ffn, "tensor"),
        ("the columns of the shared experts", shared_ffn, "tensor"),
    )
    # Every divisor of the latter is accepted: a remedy must not lead into the next refusal. The vocabulary is padded.
    of_axis = {
        "tensor": ("--tp", grid.tensor, math.gcd(a.heads, a.query_groups, ffn, shared_ffn)),
        "expert": ("--ep", grid.expert, experts),
        "expert-tensor": ("--etp", grid.expert_tensor, math.gcd(expert_width, grid.tensor)),
    }
    problems = []
    for what, size, axis in divided:
        short, ranks, allowed = of_axis[axis]
        if size % ranks:
            what = f"{what} cannot be divided over the {axis} parallel ranks"
            remedy = f"choose a {short} that divides {allowed}"
            problems.append(UsageError(what, expected=f"{short} that divides {size}", found=ranks, remedy=remedy))
    has_biases = experts and a.linear_bias

    def refuse(what: str, expected: str, found: object) -> None:
        problems.append(UsageError(what, expected=expected, found=found))

    flag, expert_tensor = "--etp", grid.expert_tensor
    if experts and grid.tensor % expert_tensor:
        what = "two expert tensor parallel ranks would share one file name"
        refuse(what, f"{flag} that divides {grid.tensor}, the tensor parallel size", expert_tensor)
    if has_biases and expert_tensor > 1:
        refuse("Megatron does not cut experts that have biases", f"{flag} 1", expert_tensor)
    if has_biases and expert_layout not in ("sequential", "te-grouped"):
        what = "this layout of experts has no place for their biases"
        refuse(what, "--expert-layout sequential or te-grouped", expert_layout)
    if not experts and grid.expert > 1:
        what = "a model without experts cannot have expert parallel ranks"
        refuse(what, "no --ep", grid.expert)
    if a.fact(MTP_KEY.field) and a.tied and grid.pipeline > 1:
        what = "Megatron-Core loads no layers of multi-token prediction beside tied embeddings from several stages"
        refuse(what, "--pp 1, or --drop-mtp", grid.pipeline)
    raise_together(problems)


#: Letters of a layout: embedding, transformer layer, loss (head); `|` ends a stage.
_LETTERS = "EtmL|"
#: Far above any real model; a repeat count is a request for memory.
_LONGEST_LAYOUT = 100_000
_FIRST, _LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
_LAYOUT = "--pipeline-model-parallel-layout"
#: What to do where a Megatron source's stages cannot be kept.
SAY_STAGES = "say how the target's pipeline is cut: --target-pipeline-parallel-size, and the flags of its layers"


@dataclass(frozen=True)
class Cut:
    """How a pipeline is cut into stages: evenly, where nothing else is said.

    Attributes:
        first, last: layers of the first and the last rank over all their virtual stages; the others share the rest.
        layout: stages one by one, such as `Et*3|(tt|)*2tL`, instead of all else.
        virtual: virtual stages of each rank; 1 is none.
        layers_each: layers of a virtual stage, instead of their number.
        with_embedding, with_loss: whether these count as a layer of the first and of the last stage.
    """

    first: int | None = None
    last: int | None = None
    layout: str | None = None
    virtual: int = 1
    layers_each: int | None = None
    with_embedding: bool = False
    with_loss: bool = False


def cut_of_args(args: JsonObject) -> Cut:
    """How training cut its pipeline."""
    layout = args.get("pipeline_model_parallel_layout")
    return Cut(
        count_of(args, "decoder_first_pipeline_num_layers"),
        count_of(args, "decoder_last_pipeline_num_layers"),
        layout if layout and isinstance(layout, str) else None,
        count_of(args, "virtual_pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank") or 1,
        count_of(args, "num_layers_per_virtual_pipeline_stage"),
        bool(args.get("account_for_embedding_in_pipeline_split")),
        bool(args.get("account_for_loss_in_pipeline_split")),
    )


def stage_layers(layers: int, pipeline: int, cut: Cut, *, mtp: int = 0) -> tuple[tuple[int, ...], ...]:
    """Layers of each chunk, by virtual stage, then by pipeline rank: the order in which a token meets them.

    `mtp` are layers of multi-token prediction, which only a layout names (`m`).

    Raises:
        UsageError: no such pipeline exists; its text gives all reasons.
    """
    reasons = []
    total, virtual = layers + cut.with_embedding + cut.with_loss, cut.virtual
    stages = []
    if cut.layout is not None:
        if (cut.first, cut.last) != (None, None):
            reasons.append(f"{_LAYOUT} excludes {_FIRST} and {_LAST}")
        letters = _parse(cut.layout, reasons)
        virtual = max(1, len(letters) // pipeline)
        if not reasons:
            reasons += _wrong_layout(letters, total, mtp, pipeline, virtual)
            counts = [stage.count("t") for stage in letters]
            stages = [counts[v * pipeline : (v + 1) * pipeline] for v in range(virtual)]
    else:
        each = pipeline * (cut.layers_each or 0)
        if each and total % each:
            reasons.append(f"virtual stages of {cut.layers_each} need a multiple of {each} layers")
        elif each:
            virtual = max(1, total // each)
        ranks = _ranks(total, pipeline, virtual, cut.first, cut.last, reasons)
        if not reasons:  # else there may be far more stages than layers
            stages = [[count // virtual for count in ranks] for _ in range(virtual)]
    if reasons:
        raise UsageError(
            f"{counted(total, 'layer')} cannot be divided over {counted(pipeline, 'pipeline rank')}"
            + (f" with {virtual} virtual stages each" if virtual != 1 else ""),
            found="; ".join(reasons),
            remedy="choose a --pp (times --vpp) that divides the layers, or say where they go: "
            f"{_FIRST} and {_LAST}, or {_LAYOUT}, e.g. Ett|(ttt|)*2ttL",
        )
    stages[0][0] -= cut.with_embedding
    stages[-1][-1] -= cut.with_loss
    return tuple(map(tuple, stages))


def _ranks(
    layers: int, pipeline: int, virtual: int, first: int | None, last: int | None, reasons: list[str]
) -> list[int]:
    """Layers of each pipeline rank; every reason against them is added to `reasons`."""
    if virtual > 1 and pipeline == 1:
        reasons.append("virtual stages need at least 2 pipeline ranks")
    if pipeline == 1 and (first, last) != (None, None):
        reasons.append(f"{_FIRST} and {_LAST} need at least 2 pipeline ranks")
    given = [count for count in (first, last) if count is not None]
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
        reasons.append(f"the layout has {len(stages)} stages, --pp times --vpp is {pipeline * virtual}")
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
