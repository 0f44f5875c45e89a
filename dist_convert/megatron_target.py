"""A Megatron checkpoint to be made: its model, grid, args, and the tensors of each file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_convert.errors import ConversionError, Problems, UsageError, raise_together
from dist_convert.job import ToMegatronJob, given_flags
from dist_convert.layout import SHARD_FILE, Chunk, Grid, place_chunks, rank_directory
from dist_convert.metadata.capacity_bins import FILE as BINS_FILE
from dist_convert.metadata.capacity_bins import bins_of_rank, load_bins, other_grid, packed
from dist_convert.metadata.hf_architecture import architecture_from_config, config_vocab
from dist_convert.metadata.target_args import (
    TargetArgs,
    padded_vocab,
    target_args,
)
from dist_convert.models import FAMILIES
from dist_convert.models.architecture import Architecture
from dist_convert.old_flags import check_model_size
from dist_convert.plan.node_local import local_name
from dist_convert.plan.stages import check_target, layout_stages, stage_layers, virtual_stages
from dist_convert.plan.target_shards import TargetDialect, lay_out_shards, written_ranks
from dist_convert.read.huggingface import HuggingFaceFiles
from dist_convert.read.megatron_shard import Shard
from dist_convert.records import TensorSpec
from dist_convert.write.megatron_files import lay_out_skeleton

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
class MegatronTarget:
    """A Megatron checkpoint to be made: its model, grid, layers by chunk, args, and the tensors of each file."""

    architecture: Architecture
    grid: Grid
    chunks: tuple[Chunk, ...]
    args: TargetArgs
    files: Mapping[str, tuple[tuple[TensorSpec, ...], ...]]
    extras: Extras


def model_and_grid(
    job: ToMegatronJob, seen: HuggingFaceFiles, margs: Mapping[str, Any] | None, *, zero_output_bias: bool
) -> tuple[Architecture, Grid, tuple[tuple[int, ...], ...]]:
    """The model that the config describes, the grid that the flags ask for, and the layers of each chunk.

    Args:
        job: the flags.
        seen: the config.
        margs: content of the margs file, if one was given; its parallel sizes stand where flags give none.
        zero_output_bias: the output projections' biases are zeros, and need no place in Megatron.

    Raises:
        UsageError, UnsupportedModel: a target that cannot exist, or a model that Megatron cannot express.
    """
    tensor = _size(job.target_tensor_parallel_size, margs, "tensor_model_parallel_size") or 1
    pipeline = _size(job.target_pipeline_parallel_size, margs, "pipeline_model_parallel_size") or 1
    vocab = config_vocab(seen.config, file=_CONFIG)
    padded = padded_vocab(vocab, job.make_vocab_size_divisible_by, tensor)
    architecture = architecture_from_config(
        seen.config, padded_vocab=padded, file=_CONFIG, zero_output_bias=zero_output_bias
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
    job: ToMegatronJob,
    directory: Path,
    given: Given,
    architecture: Architecture,
    grid: Grid,
    stages: tuple[tuple[int, ...], ...],
    params_dtype: str,
    dtypes: Mapping[str, str],
) -> MegatronTarget:
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
        return MegatronTarget(architecture, grid, chunks, args, files, {})
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
    return MegatronTarget(architecture, grid, chunks, args, files, extras)


def header_of(target: MegatronTarget, job: ToMegatronJob, file: str) -> Shard:
    """What `read_shard` will find in a planned file of the target (see `node_local.name_at`)."""
    iteration = job.iteration or 0
    skeleton = lay_out_skeleton(target.args.values, iteration, target.files[local_name(file)], file)
    weights_bytes = sum(tensor.size_bytes for chunk in skeleton.chunks for tensor in chunk.values())
    nothing: dict[str, str] = {}
    return Shard(
        file, skeleton.size_bytes, weights_bytes, iteration, dict(target.args.values), skeleton.chunks,
        (nothing,) * len(skeleton.chunks),
    )  # fmt: skip
