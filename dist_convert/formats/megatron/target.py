"""A Megatron target whatever its format: what flags, files and the source say of it, its args, and notes on it."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_convert import errors
from dist_convert.formats.megatron import grid as grids
from dist_convert.formats.megatron import target_args
from dist_convert.formats.megatron.args import check_own_vocab
from dist_convert.formats.megatron.iterations import CARRIED_FILE, TRACKER_FILE
from dist_convert.formats.megatron.parameters import parameters_of
from dist_convert.models.blocks import MTP_KEY
from dist_convert.models.catalog import Catalog
from dist_convert.models.schema import Architecture
from dist_convert.options import KINDS, RELEASE, Options
from dist_convert.plan.content import Content, notes_on_content
from dist_convert.plan.file_owners import notes_on_disks
from dist_convert.records import FilesOfRanks, JsonObject, local_name
from dist_convert.write.files import Beside, Directory, opened, write_file

ARGS_FILE = "target_megatron_args.json"

#: --model-size -> layers, hidden size, width of the MLP, vocabulary.
_SIZES = {
    "llama2-7B": (32, 4096, 11008, 32000), "llama2-13B": (40, 5120, 13824, 32000),
    "llama2-70B": (80, 8192, 28672, 32000), "llama3-8B": (32, 4096, 14336, 128256),
    "llama3-70B": (80, 8192, 28672, 128256), "mistral-7B": (32, 4096, 14336, 32000),
    "yi-34B": (60, 7168, 20480, 64000),
}  # fmt: skip


#: Megatron-LM's own names for models of any size.
_ANY_SIZE = ("llama3", "mistral", "qwen2.5")


def check_model_size(model_size: str | None, architecture: Architecture) -> None:
    """Compare `--model-size` with the config; a UsageError where they name different models, or the size is unknown."""
    if model_size in (None, *_ANY_SIZE):
        return
    expected = _SIZES.get(model_size.removesuffix("f"))
    if expected is None:
        raise errors.UsageError("unknown --model-size", expected=", ".join(_SIZES), found=model_size)
    found = (architecture.layers, architecture.hidden, architecture.ffn, architecture.vocab)
    if expected != found:
        what, remedy = "--model-size is not the model in the source", "give the right source, or leave --model-size out"
        wanted = f"{model_size}: layers, hidden size, MLP width and vocabulary {expected}"
        raise errors.UsageError(what, expected=wanted, found=f"{found}", remedy=remedy)


@dataclass(frozen=True)
class MegatronTarget:
    """A Megatron checkpoint that is to be made, whatever its format.

    Attributes:
        root: the checkpoint's, below which the iteration is made.
        architecture, settings, args: its model, what it is to be, and its training arguments.
        dtypes: of each parameter, by canonical name.
        carried: file name to content, see `huggingface.open`.
    """

    root: Path
    architecture: Architecture
    settings: target_args.Settings
    args: target_args.TargetArgs
    dtypes: Mapping[str, str]
    carried: Mapping[str, JsonObject]

    @property
    def directory(self) -> Path:
        """Of the iteration."""
        iteration = self.settings.iteration
        return self.root / (RELEASE if iteration is None else f"iter_{iteration:07d}")

    @property
    def mtp_chunk(self) -> grids.Chunk:
        """See `chunk_of_mtp`."""
        return grids.chunk_of_mtp(self.settings.chunks, self.args.values.get("pipeline_model_parallel_layout"))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The `settings` of `write.task.Target`."""
        return {**target_args.plain(self.args.values), "iteration": self.settings.iteration}

    @property
    def tracked(self) -> str:
        """What the tracker file calls it."""
        return RELEASE if self.settings.iteration is None else str(self.settings.iteration)

    def beside(self) -> dict[str, Beside]:
        """What describes this iteration in the root, and names it as the newest."""
        described = target_args.target_args_json(self.args, target_args.training_flags(self.architecture))
        return {
            ARGS_FILE: Beside(described.encode(), rb'\{.*"%s": \{.*\}\s*' % target_args.ORIGINS.encode()),
            TRACKER_FILE: Beside(self.tracked.encode(), rb"\s*([0-9]+|%s)?\s*" % RELEASE.encode()),
        }

    def write_carried(self, partial: Directory) -> None:
        """Write what it carries of a Hugging Face model, if anything."""
        if self.carried:
            write_file(partial, CARRIED_FILE, f"{json.dumps(self.carried, indent=2)}\n".encode())


_PIPELINE_OPTIONS = (
    "target_pipeline_parallel_size", "target_virtual_pipeline_parallel_size", "num_layers_per_virtual_pipeline_stage",
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "pipeline_model_parallel_layout",
)  # fmt: skip


def cuts_pipeline(job: Options) -> bool:
    """Whether a flag says how the target's pipeline is cut."""
    return any(getattr(job, name) is not None for name in _PIPELINE_OPTIONS)


def settle_target(
    job: Options, source: Architecture, given: target_args.TargetInputs
) -> tuple[Architecture, target_args.Settings]:
    """The model as padded for the target, and what that is to be; a UsageError with all reasons where it cannot be."""
    own = given.own
    theirs = own.args if own else given.training_args
    tensor = job.target_tensor_parallel_size or grids.count_of(theirs, "tensor_model_parallel_size") or 1
    pipeline = job.target_pipeline_parallel_size or grids.count_of(theirs, "pipeline_model_parallel_size") or 1
    own_divisor = grids.count_of(own.args, "make_vocab_size_divisible_by") if own else None
    divisible_by = job.make_vocab_size_divisible_by or own_divisor or 128
    architecture = replace(source, padded_vocab=target_args.padded_vocab(source.vocab, divisible_by, tensor))
    expert, expert_tensor = job.target_expert_parallel_size or 1, tensor
    if architecture.experts:
        theirs_grid = own.grid if own else grids.Grid()
        is_apart = theirs_grid.expert_tensor != theirs_grid.tensor
        usual = 1 if architecture.linear_bias else tensor  # experts that have biases are not cut
        expert = job.target_expert_parallel_size or theirs_grid.expert
        expert_tensor = job.target_expert_tensor_parallel_size or (theirs_grid.expert_tensor if is_apart else usual)
    spelled = own.dialect if own else target_args.TargetDialect()
    dialect = target_args.TargetDialect(
        job.saver_transformer_impl or spelled.norms,
        job.expert_layout or spelled.experts,
        job.mtp_layer_name or spelled.mtp,
    )
    grid = grids.Grid(tensor, pipeline, 1, expert, expert_tensor)
    keeps_pipeline = own is not None and not cuts_pipeline(job)
    chunks: list[grids.Chunk] = []

    def cut() -> None:
        kept = _kept_chunks(own, architecture) if own and keeps_pipeline else _cut_chunks(job, architecture, pipeline)
        chunks.extend(kept)

    checks: list[Callable[[], None]] = [
        lambda: check_own_vocab(None if own else job.true_vocab_size, given.vocab),
        lambda: check_model_size(job.model_size, architecture),
        lambda: grids.check_target(architecture, grid, dialect.experts),
        cut,
    ]
    errors.raise_together(errors.collected(checks))
    iteration = own.iteration if own else 1
    if job.iteration is not None:
        iteration = None if job.iteration == RELEASE else int(job.iteration)
    expected, fits = KINDS["iteration"]
    if iteration is not None and not fits(iteration):  # as no file of training has it, which may be anybody's
        what, remedy = "the checkpoint's iteration has no number that a target can have", "name one with --iteration"
        raise errors.UsageError(what, expected=expected, found=str(iteration), remedy=remedy)
    grid = replace(grid, virtual_pipeline=chunks[-1].virtual + 1)
    return architecture, target_args.Settings(iteration, divisible_by, dialect, grid, tuple(chunks), keeps_pipeline)


def _cut_chunks(job: Options, architecture: Architecture, pipeline: int) -> tuple[grids.Chunk, ...]:
    """The chunks of a pipeline that is cut as the flags say."""
    cut = grids.Cut(
        job.decoder_first_pipeline_num_layers,
        job.decoder_last_pipeline_num_layers,
        job.pipeline_model_parallel_layout,
        job.target_virtual_pipeline_parallel_size or 1,
        job.num_layers_per_virtual_pipeline_stage,
    )
    return grids.place_chunks(
        grids.stage_layers(architecture.layers, pipeline, cut, mtp=architecture.fact(MTP_KEY.field))
    )


def _kept_chunks(own: target_args.MegatronSource, architecture: Architecture) -> tuple[grids.Chunk, ...]:
    """The chunks of a Megatron source, as its files have them; its args do, too, where they say anything of stages."""
    cut = replace(grids.cut_of_args(own.args), virtual=own.grid.virtual_pipeline, layers_each=None)
    if (cut.first, cut.last, cut.layout) == (None, None, None):
        return own.chunks
    try:
        mtp = grids.count_of(own.args, MTP_KEY.arg) or 0
        said = grids.place_chunks(grids.stage_layers(architecture.layers, own.grid.pipeline, cut, mtp=mtp))
        if said == own.chunks:
            return own.chunks
        found = f"layers {[chunk.layers for chunk in said]}, according to the args"
    except errors.ConversionError as error:
        found = str(error)
    what = "the pipeline stages in the args differ from those in the files"
    expected = f"layers {[chunk.layers for chunk in own.chunks]}, as in the files"
    raise errors.InconsistentShards(what, expected=expected, found=found, remedy=grids.SAY_STAGES)


def notes_to_megatron(
    job: Options,
    target: MegatronTarget,
    given: target_args.TargetInputs,
    content: Content,
    disks: Sequence[int],
    writable: FilesOfRanks,
) -> list[str]:
    """All notes on a target."""
    notes, grid = _on_spelling(job, target), target.settings.grid
    groups, ranks = target.architecture.query_groups, grid.tensor
    if groups < ranks:
        few = f"{groups} query groups on {ranks} tensor parallel ranks"
        notes.append(f"{few}: only Megatron-Core 0.16 and newer load such a checkpoint")
    flags = [] if given.own else target_args.training_flags(target.architecture)
    values = target.args.values
    if not given.own and not values["tokenizer_model"] and values["tokenizer_type"] == "HuggingFaceTokenizer":
        flags.append("--tokenizer-model PATH")
    if flags:
        notes.append(f"training needs these flags, which --use-checkpoint-args does not restore: {' '.join(flags)}")
    sizes = {
        "tensor": (job.target_tensor_parallel_size, grid.tensor),
        "pipeline": (job.target_pipeline_parallel_size, grid.pipeline),
        "expert": (job.target_expert_parallel_size, grid.expert),
    }
    taken = [f"{axis} {size}" for axis, (flag, size) in sizes.items() if flag is None and size > 1]
    whose = job.source_margs_file.name if job.source_margs_file else "the source"
    if taken:
        notes.append(f"parallel sizes kept from {whose}, as no flag sets them: {', '.join(taken)}")
    notes += _on_training_args(job, target, given.training_args or {})
    if given.own and given.vocab is None:
        notes.append(
            f"warning: the number of tokens in the vocabulary is unknown: all {target.architecture.vocab} rows are "
            "kept; give --true-vocab-size if training should pad it again"
        )
    if target.settings.iteration == 0:
        notes.append("iteration 0: Habana's Megatron and Megatron-Core up to 0.14 do not load it; use --iteration 1")
    notes += _on_tracker(job, target) + notes_on_content(content)
    if job.verbose:
        notes += target_args.describe_origins(target.args)
    asked = job.tokenizer_model
    if (
        asked is not None and not os.path.lexists(asked) and not target_args.is_hub_name(asked)
    ):  # training may run elsewhere
        is_away = f"--tokenizer-model {asked} is not on this machine"
        notes.append(f"warning: {is_away}; the target's args name it as it is, and training must find it there")
    return notes + _on_disks(job, disks, writable)


def _on_tracker(job: Options, target: MegatronTarget) -> list[str]:
    """What training loads from this root changes, where the tracker file names another iteration."""
    tracker = target.root / TRACKER_FILE
    try:
        with opened(target.root.resolve(), TRACKER_FILE) as descriptor:
            old = os.read(descriptor, 40).decode(errors="replace").strip()
    except OSError:
        return []
    new = target.tracked
    if old == new:
        return []
    from dist_convert.write.manifest import manifest_of  # needs torch, which planning does without
    from dist_convert.write.partial import is_ours

    if not job.overwrite and manifest_of(target.directory) and not is_ours(target.directory):
        return [f"{tracker} names {old!r} and stays as it is: {new!r} was already complete"]
    return [f"warning: {tracker} names {old!r}, and will name {new!r}"]


def _on_spelling(job: Options, target: MegatronTarget) -> list[str]:
    if not target.architecture.experts:
        given = {"--expert-layout": job.expert_layout not in (None, "sequential")}
        given["--target-expert-tensor-parallel-size"] = job.target_expert_tensor_parallel_size is not None
        return [f"{flag} has no effect: the model has no experts" for flag, is_given in given.items() if is_given]
    experts, norms = target.settings.dialect.experts, target.settings.dialect.norms
    goes_with = "te-grouped goes with --saver-transformer-impl transformer_engine, habana-dynamic with habana"
    warning = f"warning: no version of Megatron has {experts} experts beside the norms of {norms}; {goes_with}"
    is_odd = (experts, norms) in (("te-grouped", "local"), ("habana-dynamic", "transformer_engine"))
    return [warning] if is_odd else []


def _on_training_args(job: Options, target: MegatronTarget, training_args: JsonObject) -> list[str]:
    """What a margs file says of the layout besides the two sizes that are taken from it, and the target does not have.

    The target's own args describe it as it is; a command line of the earlier training would not fit it.
    """
    is_taken = job.target_pipeline_parallel_size is None and target.settings.grid.pipeline > 1
    names = (
        *(target_args.PIPELINE_LAYOUT if is_taken else ()),
        *(grids.SIZES[2:] if target.architecture.experts else ()),
    )
    left = [
        f"{name} {training_args[name]} ({target.args.values.get(name)} here)"
        for name in names
        if training_args.get(name) and training_args[name] != target.args.values.get(name)
    ]
    if not left:
        return []
    return [f"warning: the margs file's training had another layout, which only flags can set: {', '.join(left)}"]


def _on_disks(job: Options, disks: Sequence[int], writable: FilesOfRanks) -> list[str]:
    if job.target_ranks_per_node is None:
        return []
    files_at = (writable[disks.index(disk)] for disk in range(max(disks) + 1))
    directories = [sorted(local_name(file).partition("/")[0] for file in files) for files in files_at]
    return notes_on_disks("--target-ranks-per-node", disks, [", ".join(listed) for listed in directories])


def target_dtypes(source: Catalog, target_dtype: str | None) -> dict[str, str]:
    """For each Megatron parameter the dtype that it is written in.

    `target_dtype` is what most of it becomes; tensors of other dtypes keep theirs. None keeps all.

    Raises:
        UnsupportedModel: a parameter whose parts are stored in several dtypes.
    """
    problems = []
    found = {}
    for parameter in parameters_of(source.architecture, grids.Grid()):
        parts = parameter.row.parts
        names = [part.name.format(layer=parameter.layer, expert=parameter.expert) for part in parts]
        stored = sorted({source.tensors[name].dtype for name in names})
        if len(stored) > 1:
            what, remedy = "tensors that become one Megatron parameter need one dtype", "save the model in one dtype"
            file = next(view.file for region in source.regions(names[0]) for view in region.replicas)
            tensor, dtypes = ", ".join(names), ", ".join(stored)
            problems.append(errors.UnsupportedModel(what, file, tensor=tensor, found=dtypes, remedy=remedy))
        found[parameter.name] = source.tensors[names[0]].dtype_in(target_dtype, source.params_dtype)
    errors.raise_together(problems)
    return found
