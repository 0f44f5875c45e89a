"""A Megatron target whatever its format: what flags, files and the source say of it, its args, and notes on it."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_convert.errors import (
    ConversionError,
    InconsistentShards,
    Problems,
    UnsupportedModel,
    UsageError,
    raise_together,
)
from dist_convert.formats.megatron.args import check_own_vocab
from dist_convert.formats.megatron.grid import (
    SAY_STAGES,
    Chunk,
    Cut,
    Grid,
    check_target,
    chunk_of_mtp,
    cut_of_args,
    place_chunks,
    stage_layers,
)
from dist_convert.formats.megatron.iterations import CARRIED_FILE, TRACKER_FILE
from dist_convert.formats.megatron.parameters import parameters_of
from dist_convert.formats.megatron.target_args import (
    ORIGINS,
    PIPELINE_LAYOUT,
    MegatronSource,
    Settings,
    TargetArgs,
    TargetDialect,
    TargetInputs,
    describe_origins,
    is_hub_name,
    padded_vocab,
    plain,
    target_args_json,
    training_flags,
)
from dist_convert.models.catalog import Catalog
from dist_convert.models.prediction import MTP_KEY
from dist_convert.models.schema import Architecture
from dist_convert.options import RELEASE, Options
from dist_convert.plan.content import Content, notes_on_content
from dist_convert.plan.file_owners import notes_on_disks
from dist_convert.records import local_name
from dist_convert.write.files import Beside, opened, write_file

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
    """Compare `--model-size` with the config.

    Raises:
        UsageError: they name different models, or the size is unknown.
    """
    if model_size in (None, *_ANY_SIZE):
        return
    expected = _SIZES.get(model_size.removesuffix("f"))
    if expected is None:
        raise UsageError("unknown --model-size", expected=", ".join(_SIZES), found=model_size)
    found = (architecture.layers, architecture.hidden, architecture.ffn, architecture.vocab)
    if expected != found:
        raise UsageError(
            "--model-size is not the model in the source",
            expected=f"{model_size}: layers, hidden size, MLP width and vocabulary {expected}",
            found=f"{found}",
            remedy="give the right source, or leave --model-size out",
        )


@dataclass(frozen=True)
class MegatronTarget:
    """A Megatron checkpoint that is to be made, whatever its format.

    Attributes:
        root: the checkpoint's, below which the iteration is made.
        architecture, settings, args: its model, what it is to be, and its training arguments.
        dtypes: of each parameter, by canonical name.
        carried: file name to content, see `huggingface.carried`.
    """

    root: Path
    architecture: Architecture
    settings: Settings
    args: TargetArgs
    dtypes: Mapping[str, str]
    carried: Mapping[str, Mapping[str, Any]]

    @property
    def directory(self) -> Path:
        """Of the iteration."""
        iteration = self.settings.iteration
        return self.root / (RELEASE if iteration is None else f"iter_{iteration:07d}")

    @property
    def mtp_chunk(self) -> Chunk:
        """See `chunk_of_mtp`."""
        return chunk_of_mtp(self.settings.chunks, self.args.values.get("pipeline_model_parallel_layout"))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The `settings` of `write.task.Target`."""
        return {**plain(self.args.values), "iteration": self.settings.iteration}

    @property
    def tracked(self) -> str:
        """What the tracker file calls it."""
        return RELEASE if self.settings.iteration is None else str(self.settings.iteration)

    def beside(self) -> dict[str, Beside]:
        """What describes this iteration in the root, and names it as the newest."""
        described = target_args_json(self.args, training_flags(self.architecture))
        return {
            ARGS_FILE: Beside(described.encode(), rb'\{.*"%s": \{.*\}\s*' % ORIGINS.encode()),
            TRACKER_FILE: Beside(self.tracked.encode(), rb"\s*([0-9]+|%s)?\s*" % RELEASE.encode()),
        }

    def write_carried(self, partial: Path) -> None:
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


def settle_target(job: Options, source: Architecture, given: TargetInputs) -> tuple[Architecture, Settings]:
    """The model as it is padded for the target, and what the target is to be.

    Raises:
        UsageError: a target that cannot exist; all reasons are reported together.
    """
    own = given.own
    theirs = own.args if own else given.training_args
    tensor = job.target_tensor_parallel_size or _size(theirs, "tensor_model_parallel_size") or 1
    pipeline = job.target_pipeline_parallel_size or _size(theirs, "pipeline_model_parallel_size") or 1
    own_divisor = _size(own.args, "make_vocab_size_divisible_by") if own else None
    divisible_by = job.make_vocab_size_divisible_by or own_divisor or 128
    architecture = replace(source, padded_vocab=padded_vocab(source.vocab, divisible_by, tensor))
    expert, expert_tensor = job.target_expert_parallel_size or 1, tensor
    if architecture.experts:
        theirs_grid = own.grid if own else Grid()
        is_apart = theirs_grid.expert_tensor != theirs_grid.tensor
        usual = 1 if architecture.linear_bias else tensor  # experts that have biases are not cut
        expert = job.target_expert_parallel_size or theirs_grid.expert
        expert_tensor = job.target_expert_tensor_parallel_size or (theirs_grid.expert_tensor if is_apart else usual)
    spelled = own.dialect if own else TargetDialect()
    dialect = TargetDialect(
        job.saver_transformer_impl or spelled.norms,
        job.expert_layout or spelled.experts,
        job.mtp_layer_name or spelled.mtp,
    )
    grid = Grid(tensor, pipeline, 1, expert, expert_tensor)
    keeps_pipeline = own is not None and not cuts_pipeline(job)
    chunks: tuple[Chunk, ...] = ()
    problems: list[ConversionError] = []
    with _collected(problems):
        if own is None:
            check_own_vocab(job.true_vocab_size, given.vocab)
    with _collected(problems):
        check_model_size(job.model_size, architecture)
    with _collected(problems):
        check_target(architecture, grid, dialect.experts)
    with _collected(problems):
        chunks = _kept_chunks(own, architecture) if own and keeps_pipeline else _cut_chunks(job, architecture, pipeline)
    raise_together(problems)
    iteration = own.iteration if own else 1
    if job.iteration is not None:
        iteration = None if job.iteration == RELEASE else int(job.iteration)
    grid = replace(grid, virtual_pipeline=chunks[-1].virtual + 1)
    return architecture, Settings(iteration, divisible_by, dialect, grid, chunks, keeps_pipeline)


def _cut_chunks(job: Options, architecture: Architecture, pipeline: int) -> tuple[Chunk, ...]:
    """The chunks of a pipeline that is cut as the flags say."""
    cut = Cut(
        job.decoder_first_pipeline_num_layers,
        job.decoder_last_pipeline_num_layers,
        job.pipeline_model_parallel_layout,
        job.target_virtual_pipeline_parallel_size or 1,
        job.num_layers_per_virtual_pipeline_stage,
    )
    return place_chunks(stage_layers(architecture.layers, pipeline, cut, mtp=architecture.fact(MTP_KEY.field)))


def _kept_chunks(own: MegatronSource, architecture: Architecture) -> tuple[Chunk, ...]:
    """The chunks of a Megatron source, as its files have them; its args do, too, where they say anything of stages."""
    cut = replace(cut_of_args(own.args), virtual=own.grid.virtual_pipeline, layers_each=None)
    if (cut.first, cut.last, cut.layout) == (None, None, None):
        return own.chunks
    try:
        mtp = _size(own.args, MTP_KEY.arg) or 0
        said = place_chunks(stage_layers(architecture.layers, own.grid.pipeline, cut, mtp=mtp))
        if said == own.chunks:
            return own.chunks
        found = f"layers {[chunk.layers for chunk in said]}, by the args"
    except ConversionError as error:
        found = str(error)
    raise InconsistentShards(
        "the args describe other pipeline stages than the files have",
        expected=f"layers {[chunk.layers for chunk in own.chunks]}, as in the files",
        found=found,
        remedy=SAY_STAGES,
    )


@contextmanager
def _collected(problems: list[ConversionError]) -> Iterator[None]:
    """Keep what goes wrong inside, for it to be reported with the rest."""
    try:
        yield
    except Problems as several:
        problems += several.problems
    except ConversionError as problem:
        problems.append(problem)


def _size(args: Mapping[str, Any] | None, name: str) -> int | None:
    """A parallel size that some training had."""
    theirs = (args or {}).get(name)
    return theirs if type(theirs) is int and theirs > 0 else None


_EXPERT_GRID = ("expert_model_parallel_size", "expert_tensor_parallel_size")


def notes_to_megatron(
    job: Options,
    target: MegatronTarget,
    given: TargetInputs,
    content: Content,
    disks: Sequence[int],
    writable: Sequence[frozenset[str]],
) -> list[str]:
    """All notes on a target."""
    notes, grid = _on_spelling(job, target), target.settings.grid
    groups, ranks = target.architecture.query_groups, grid.tensor
    if groups < ranks:
        notes.append(
            f"{groups} query groups on {ranks} tensor parallel ranks: only Megatron-Core 0.16 and newer load such a "
            "checkpoint"
        )
    flags = [] if given.own else training_flags(target.architecture)
    if flags:
        notes.append(f"training needs, beside --use-checkpoint-args, which does not restore it: {' '.join(flags)}")
    sizes = {
        "tensor": (job.target_tensor_parallel_size, grid.tensor),
        "pipeline": (job.target_pipeline_parallel_size, grid.pipeline),
        "expert": (job.target_expert_parallel_size, grid.expert),
    }
    taken = [f"{axis} {size}" for axis, (flag, size) in sizes.items() if flag is None and size > 1]
    whose = job.source_margs_file.name if job.source_margs_file else "the source"
    if taken:
        notes.append(f"parallel sizes of {whose}, as no flag gives them: {', '.join(taken)}")
    notes += _on_training_args(job, target, given.training_args or {})
    if given.own and given.vocab is None:
        notes.append(
            f"warning: nobody says how many tokens the vocabulary has: all {target.architecture.vocab} rows are kept; "
            "give --true-vocab-size if training is to pad it anew"
        )
    if target.settings.iteration == 0:
        notes.append("iteration 0: Habana's Megatron and Megatron-Core up to 0.14 do not load it; use --iteration 1")
    notes += _on_tracker(job, target) + notes_on_content(content)
    if job.verbose:
        notes += describe_origins(target.args)
    asked = job.tokenizer_model
    if asked is not None and not os.path.lexists(asked) and not is_hub_name(asked):  # training may run elsewhere
        notes.append(
            f"warning: --tokenizer-model {asked} is not on this machine; the target's args name it as it is, and "
            "training must find it there"
        )
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
        return [f"{tracker} names {old!r} and stays as it is: {new!r} was complete before"]
    return [f"warning: {tracker} names {old!r}, and will name {new!r}"]


def _on_spelling(job: Options, target: MegatronTarget) -> list[str]:
    if not target.architecture.experts:
        given = {"--expert-layout": job.expert_layout not in (None, "sequential")}
        given["--target-expert-tensor-parallel-size"] = job.target_expert_tensor_parallel_size is not None
        return [f"{flag} has no effect: the model has no experts" for flag, is_given in given.items() if is_given]
    experts, norms = target.settings.dialect.experts, target.settings.dialect.norms
    if (experts, norms) in (("te-grouped", "local"), ("habana-dynamic", "transformer_engine")):
        return [
            f"warning: no version of Megatron has {experts} experts beside the norms of {norms}; te-grouped goes with "
            "--saver-transformer-impl transformer_engine, habana-dynamic with habana"
        ]
    return []


def _on_training_args(job: Options, target: MegatronTarget, training_args: Mapping[str, Any]) -> list[str]:
    """What a margs file says of the layout besides the two sizes that are taken from it, and the target does not have.

    The target's own args describe it as it is; a command line of the earlier training would not fit it.
    """
    is_taken = job.target_pipeline_parallel_size is None and target.settings.grid.pipeline > 1
    names = (*(PIPELINE_LAYOUT if is_taken else ()), *(_EXPERT_GRID if target.architecture.experts else ()))
    left = [
        f"{name} {training_args[name]} ({target.args.values.get(name)} here)"
        for name in names
        if training_args.get(name) and training_args[name] != target.args.values.get(name)
    ]
    if not left:
        return []
    return [
        f"warning: the margs file's training had another layout, which only flags bring into the target: "
        f"{', '.join(left)}"
    ]


def _on_disks(job: Options, disks: Sequence[int], writable: Sequence[frozenset[str]]) -> list[str]:
    if job.target_ranks_per_node is None:
        return []
    files_at = (writable[disks.index(disk)] for disk in range(max(disks) + 1))
    directories = [sorted(local_name(file).partition("/")[0] for file in files) for files in files_at]
    return notes_on_disks("--target-ranks-per-node", disks, [", ".join(listed) for listed in directories])


def target_dtypes(source: Catalog, target_dtype: str | None) -> dict[str, str]:
    """For each Megatron parameter the dtype that it is written in.

    Args:
        source: of the same family.
        target_dtype: what most of it becomes; tensors of other dtypes keep theirs. None keeps all.

    Raises:
        UnsupportedModel: a parameter whose parts are stored in several dtypes.
    """
    problems: list[ConversionError] = []
    found: dict[str, str] = {}
    for parameter in parameters_of(source.architecture, Grid()):
        parts = parameter.row.parts
        names = [part.name.format(layer=parameter.layer, expert=parameter.expert) for part in parts]
        stored = sorted({source.tensors[name].dtype for name in names})
        if len(stored) > 1:
            problems.append(
                UnsupportedModel(
                    "tensors that become one Megatron parameter need one dtype",
                    tensor=", ".join(names),
                    file=next(view.file for region in source.regions(names[0]) for view in region.replicas),
                    found=", ".join(stored),
                    remedy="save the model in one dtype",
                )
            )
        found[parameter.name] = source.tensors[names[0]].dtype_in(target_dtype, source.params_dtype)
    raise_together(problems)
    return found
