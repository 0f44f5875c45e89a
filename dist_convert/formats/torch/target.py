"""A Megatron checkpoint to be made: its model, grid, args, the tensors of each file, and notes on it for the user."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_convert.errors import ConversionError, Problems, UsageError, raise_together
from dist_convert.formats.huggingface.config import architecture_from_config, config_vocab
from dist_convert.formats.megatron.grid import (
    SHARD_FILE,
    Chunk,
    Grid,
    check_target,
    layout_stages,
    notes_on_target,
    place_chunks,
    rank_directory,
    stage_layers,
    virtual_stages,
)
from dist_convert.formats.torch.capacity_bins import FILE as BINS_FILE
from dist_convert.formats.torch.capacity_bins import bins_of_rank, load_bins, other_grid, packed
from dist_convert.formats.torch.target_args import (
    TargetArgs,
    args_json,
    describe_origins,
    is_hub_name,
    padded_vocab,
    target_args,
    target_margs_json,
)
from dist_convert.formats.torch.target_shards import TargetDialect, lay_out_shards, written_ranks
from dist_convert.models import FAMILIES
from dist_convert.models.schema import Architecture
from dist_convert.options import Options, given_flags
from dist_convert.plan.content import Content
from dist_convert.read.megatron import TRACKER_FILE, Shard
from dist_convert.records import TargetFile, TensorSpec, local_name
from dist_convert.report import human_notes
from dist_convert.write.checksums import KnownRange, seal
from dist_convert.write.files import replace_text, write_tracker
from dist_convert.write.megatron_files import lay_out_skeleton, write_skeleton

ARGS_FILE = "target_megatron_args.json"

#: --model-size -> layers, hidden size, width of the MLP, vocabulary.
_SIZES = {
    "llama2-7B": (32, 4096, 11008, 32000), "llama2-13B": (40, 5120, 13824, 32000),
    "llama2-70B": (80, 8192, 28672, 32000), "llama3-8B": (32, 4096, 14336, 128256),
    "llama3-70B": (80, 8192, 28672, 128256), "mistral-7B": (32, 4096, 14336, 32000),
    "yi-34B": (60, 7168, 20480, 64000),
}  # fmt: skip


def check_model_size(model_size: str | None, architecture: Architecture) -> None:
    """Compare `--model-size` with the config.

    Raises:
        UsageError: they name different models, or the size is unknown.
    """
    if model_size is None or model_size == "qwen2.5":
        return
    expected = _SIZES.get(model_size.removesuffix("f"))
    if expected is None:
        raise UsageError("unknown --model-size", expected=", ".join(_SIZES), found=model_size)
    found = (architecture.layers, architecture.hidden, architecture.ffn, architecture.vocab)
    if expected != found:
        raise UsageError(
            "--model-size is not the model in --load-dir",
            expected=f"{model_size}: layers, hidden size, MLP width and vocabulary {expected}",
            found=f"{found}",
            remedy="give the right --load-dir, or leave --model-size out",
        )


_CONFIG = "config.json"

#: Values that are in the target beside the weights: (file, name) -> bytes.
Extras = Mapping[tuple[str, str], bytes]


@dataclass(frozen=True)
class Given:
    """What files say of a target beside the flags: the margs file, if one was given, and the tokenizer's."""

    margs: Mapping[str, Any] | None
    tokenizer_model: str | None
    tokenizer_type: str | None


@dataclass(frozen=True)
class TorchTarget:
    """A checkpoint of rank files that is to be made; a `Target`.

    Attributes:
        root: the checkpoint's, below which the iteration is made.
        iteration: its number; None for a release.
        architecture, grid, chunks, args: its model, its parallel sizes, its layers by chunk, its training arguments.
        files: the tensors of each rank file, by virtual stage.
        extras: values that are in the target beside the weights.
    """

    root: Path
    iteration: int | None
    architecture: Architecture
    grid: Grid
    chunks: tuple[Chunk, ...]
    args: TargetArgs
    files: Mapping[str, tuple[tuple[TensorSpec, ...], ...]]
    extras: Extras

    @property
    def settings(self) -> Mapping[str, Any]:
        args: dict[str, Any] = json.loads(args_json(self.args))
        bins = hashlib.sha256(repr(sorted(self.extras.items())).encode()).hexdigest()
        return args | {"iteration": self.iteration} | ({BINS_FILE: bins} if self.extras else {})

    def make_files(self, partial: Path, files: Sequence[TargetFile], *, is_first: bool) -> None:
        """See `Target`."""
        for name in (local_name(file.name) for file in files):
            write_skeleton(partial / name, self.args.values, self.iteration or 0, self.files[name])

    def complete(
        self, partial: Path, files: Sequence[TargetFile], known: Mapping[str, Sequence[KnownRange]], *, is_first: bool
    ) -> None:
        """See `Target`: what is in the files beside the weights, and the checksums of all that is in them."""
        for file in files:
            name = local_name(file.name)
            tensors = {tensor.name: tensor for tensor in file.tensors}
            with (partial / name).open("r+b") as output:
                for tensor, data in ((tensor, data) for (of, tensor), data in self.extras.items() if of == name):
                    output.seek(tensors[tensor].offset_bytes)
                    output.write(data)
            seal(partial, name, known.get(file.name, ()))

    def publish(self) -> None:
        """Name this iteration as the newest, and describe it beside the others."""
        replace_text(self.root / ARGS_FILE, target_margs_json(self.args))
        write_tracker(self.root, self.iteration)

    def to_do(self) -> str:
        """See `Target`."""
        return ""


def model_and_grid(
    job: Options, config: Mapping[str, Any], margs: Mapping[str, Any] | None, *, zero_output_bias: bool
) -> tuple[Architecture, Grid, tuple[tuple[int, ...], ...]]:
    """The model that the config describes, the grid that the flags ask for, and the layers of each chunk.

    Args:
        job: the flags.
        config: of the source.
        margs: content of the margs file, if one was given; its parallel sizes stand where flags give none.
        zero_output_bias: the output projections' biases are zeros, and need no place in Megatron.

    Raises:
        UsageError, UnsupportedModel: a target that cannot exist, or a model that Megatron cannot express.
    """
    tensor = _size(job.target_tensor_parallel_size, margs, "tensor_model_parallel_size") or 1
    pipeline = _size(job.target_pipeline_parallel_size, margs, "pipeline_model_parallel_size") or 1
    vocab = config_vocab(config, file=_CONFIG)
    padded = padded_vocab(vocab, job.make_vocab_size_divisible_by, tensor)
    architecture = architecture_from_config(
        config, padded_vocab=padded, file=_CONFIG, zero_output_bias=zero_output_bias
    )
    problems: list[ConversionError] = []
    if job.true_vocab_size not in (None, vocab):
        problems.append(
            UsageError(
                "--true-vocab-size is not the model's",
                file=_CONFIG,
                expected=f"vocab_size {vocab}",
                found=job.true_vocab_size,
                remedy="leave --true-vocab-size out",
            )
        )
    layout, virtual = job.pipeline_model_parallel_layout, job.target_virtual_pipeline_parallel_size or 1
    with _collected(problems):
        check_model_size(job.model_size, architecture)
    with _collected(problems):
        if layout:
            virtual = max(1, layout_stages(layout) // pipeline)
        elif job.num_layers_per_virtual_pipeline_stage:
            virtual = virtual_stages(architecture.layers, pipeline, job.num_layers_per_virtual_pipeline_stage)
    stages_are_known = not problems
    expert_tensor = (job.target_expert_tensor_parallel_size or tensor) if architecture.experts else tensor
    grid = Grid(tensor, pipeline, virtual, job.target_expert_parallel_size or 1, expert_tensor)
    first, last = job.decoder_first_pipeline_num_layers, job.decoder_last_pipeline_num_layers
    with _collected(problems):
        check_target(architecture, grid, first=first, last=last, layout=layout if stages_are_known else None)
    raise_together(problems)
    stages = stage_layers(architecture.layers, pipeline, virtual, first=first, last=last, layout=layout)
    return architecture, grid, stages


@contextmanager
def _collected(problems: list[ConversionError]) -> Iterator[None]:
    """Keep what goes wrong inside, for it to be reported with the rest."""
    try:
        yield
    except Problems as several:
        problems += several.problems
    except ConversionError as problem:
        problems.append(problem)


def _size(flag: int | None, margs: Mapping[str, Any] | None, name: str) -> int | None:
    """A parallel size: the flag's, else the one that the margs file's training had."""
    theirs = (margs or {}).get(name)
    return flag or (theirs if type(theirs) is int and theirs > 0 else None)


def lay_out_target(
    job: Options,
    directory: Path,
    given: Given,
    architecture: Architecture,
    grid: Grid,
    stages: tuple[tuple[int, ...], ...],
    params_dtype: str,
    dtypes: Mapping[str, str],
) -> TorchTarget:
    """The args of the target and the tensors of each of its files.

    Args:
        job: what was asked for.
        directory: of the source, for its capacity bins.
        given: what files say beside the flags.
        architecture, grid, stages: of `model_and_grid`.
        params_dtype: safetensors name of most weights.
        dtypes: of each parameter, by canonical name.
    """
    args = target_args(
        architecture,
        grid=grid,
        stages=stages,
        params_dtype=params_dtype,
        iteration=job.iteration,
        vocab=architecture.vocab,
        make_vocab_size_divisible_by=job.make_vocab_size_divisible_by,
        margs=given.margs,
        tokenizer_model=given.tokenizer_model,
        tokenizer_type=given.tokenizer_type,
        transformer_impl=job.saver_transformer_impl,
        expert_layout=job.expert_layout,
        first=job.decoder_first_pipeline_num_layers,
        last=job.decoder_last_pipeline_num_layers,
        layout=job.pipeline_model_parallel_layout,
        given=given_flags(job),
    )
    layers_of = {(p, v): stages[v][p] for v in range(grid.virtual_pipeline) for p in range(grid.pipeline)}
    chunks = place_chunks(grid, layers_of)
    dialect = TargetDialect(job.saver_transformer_impl, job.expert_layout)
    files = lay_out_shards(architecture, FAMILIES[architecture.family], grid, chunks, dialect, dtypes)
    if not job.load_capacity_bins:
        return TorchTarget(job.target, job.iteration, architecture, grid, chunks, args, files, {})
    if not architecture.experts or job.expert_layout == "habana-dynamic":
        raise UsageError(
            "the target has no place for capacity bins",
            expected="experts, in another layout than habana-dynamic",
            found=f"--expert-layout {job.expert_layout}" if architecture.experts else "a model without experts",
            remedy="leave --load-capacity-bins out",
        )
    bins = load_bins(directory / BINS_FILE)
    extras: dict[tuple[str, str], bytes] = {}
    taken = 0
    for rank in written_ranks(grid):
        file = f"{rank_directory(grid, rank)}/{SHARD_FILE}"
        for virtual, tensors in bins_of_rank(bins, rank, chunks).items():
            specs = tuple((name, dtype, (len(values),)) for name, (dtype, values) in sorted(tensors.items()))
            models = files[file]
            files[file] = (*models[:virtual], models[virtual] + specs, *models[virtual + 1 :])
            label = "" if len(models) == 1 else f"model{virtual}."
            taken += len(tensors)
            extras |= {(file, label + name): packed(dtype, values) for name, (dtype, values) in tensors.items()}
    lengths = [len(values) for (*_, name), (_, values) in bins.items() if name == "capacity_bins"]
    if lengths:  # without it training makes no buffers for the bins, and refuses the file
        args.values["moe_capacity_bins_num"] = lengths[0]
        args.origins["moe_capacity_bins_num"] = f"flag --load-capacity-bins ({BINS_FILE})"
    if taken != len(bins):
        raise other_grid(f"{taken} bin tensors", f"{len(bins)} bin tensors")
    return TorchTarget(job.target, job.iteration, architecture, grid, chunks, args, files, extras)


def header_of(target: TorchTarget, job: Options, file: str) -> Shard:
    """What `read_shard` will find in a planned file of the target (see `records.name_at`)."""
    iteration = job.iteration or 0
    skeleton = lay_out_skeleton(target.args.values, iteration, target.files[local_name(file)], file)
    weights_bytes = sum(tensor.size_bytes for chunk in skeleton.chunks for tensor in chunk.values())
    nothing: dict[str, str] = {}
    return Shard(
        file, skeleton.size_bytes, weights_bytes, iteration, dict(target.args.values), skeleton.chunks,
        (nothing,) * len(skeleton.chunks),
    )  # fmt: skip


_PIPELINE_LAYOUT = (
    "virtual_pipeline_model_parallel_size", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip
_EXPERT_GRID = ("expert_model_parallel_size", "expert_tensor_parallel_size")


def notes_to_megatron(
    job: Options,
    target: TorchTarget,
    margs: Mapping[str, Any] | None,
    content: Content,
    places: Sequence[int],
    writable: Sequence[frozenset[str]],
) -> list[str]:
    """All notes on a target.

    Args:
        job: what was asked for.
        target, content: what will be written.
        margs: content of the margs file, if one was given.
        places, writable: for each rank, where its target lies, and the files that it can write.
    """
    notes = [*notes_on_target(target.architecture, target.grid), *_on_spelling(job, target)]
    sizes = {"tensor": (job.target_tensor_parallel_size, target.grid.tensor)}
    sizes["pipeline"] = job.target_pipeline_parallel_size, target.grid.pipeline
    taken = [f"{axis} {size}" for axis, (flag, size) in sizes.items() if flag is None and size > 1]
    if job.source_margs_file and taken:
        notes.append(f"parallel sizes of {job.source_margs_file.name}, as no flag gives them: {', '.join(taken)}")
    notes += _on_margs(job, target, margs or {})
    if job.iteration == 0:
        notes.append("iteration 0: Habana's Megatron and Megatron-Core up to 0.14 do not load it; use --iteration 1")
    notes += _on_tracker(job) + human_notes(content)
    if job.verbose:
        notes.append(describe_origins(target.args))
    return notes + _on_tokenizer(job) + _on_places(job, places, writable)


def _on_tracker(job: Options) -> list[str]:
    """What training loads from this root changes, where the tracker file names another iteration."""
    try:
        old = (job.target / TRACKER_FILE).read_text(encoding="utf-8", errors="replace").strip()[:40]
    except OSError:
        return []
    new = "release" if job.iteration is None else str(job.iteration)
    return [f"warning: {job.target / TRACKER_FILE} names {old!r}, and will name {new!r}"] if old != new else []


def _on_spelling(job: Options, target: TorchTarget) -> list[str]:
    if not target.architecture.experts:
        given = {"--expert-layout": job.expert_layout != "sequential"}
        given["--target-expert-tensor-parallel-size"] = job.target_expert_tensor_parallel_size is not None
        return [f"{flag} has no effect: the model has no experts" for flag, is_given in given.items() if is_given]
    experts, norms = job.expert_layout, job.saver_transformer_impl
    if (experts, norms) in (("te-grouped", "local"), ("habana-dynamic", "transformer_engine")):
        return [
            f"warning: no version of Megatron has {experts} experts beside the norms of {norms}; te-grouped goes with "
            "--saver-transformer-impl transformer_engine, habana-dynamic with habana"
        ]
    return []


def _on_margs(job: Options, target: TorchTarget, margs: Mapping[str, Any]) -> list[str]:
    """What a margs file says of the layout besides the two sizes that are taken from it, and the target does not have.

    The target's own args describe it as it is; a command line of the earlier training would not fit it.
    """
    is_taken = job.target_pipeline_parallel_size is None and target.grid.pipeline > 1
    names = (*(_PIPELINE_LAYOUT if is_taken else ()), *(_EXPERT_GRID if target.architecture.experts else ()))
    left = [
        f"{name} {margs[name]} ({target.args.values.get(name)} here)"
        for name in names
        if margs.get(name) and margs[name] != target.args.values.get(name)
    ]
    if not left:
        return []
    return [
        f"warning: the margs file's training had another layout, which only flags bring into the target: "
        f"{', '.join(left)}"
    ]


def _on_tokenizer(job: Options) -> list[str]:
    """The training may run on other machines, which have the tokenizer's path: no error."""
    asked = job.tokenizer_model
    if asked is None or os.path.lexists(asked) or is_hub_name(asked):
        return []
    return [
        f"warning: --tokenizer-model {asked} is not on this machine; the target's args name it as it is, and training "
        "must find it there"
    ]


def _on_places(job: Options, places: Sequence[int], writable: Sequence[frozenset[str]]) -> list[str]:
    if job.target_ranks_per_node is None:
        return []
    if not max(places):
        return ["--target-ranks-per-node has no effect: all ranks see one and the same --save-dir"]
    notes = []
    for place in range(max(places) + 1):
        ranks = [str(rank) for rank, of_rank in enumerate(places) if of_rank == place]
        files = sorted(local_name(file).partition("/")[0] for file in writable[places.index(place)])
        notes.append(f"own disk of {'ranks' if len(ranks) > 1 else 'rank'} {', '.join(ranks)}: {', '.join(files)}")
    return notes
