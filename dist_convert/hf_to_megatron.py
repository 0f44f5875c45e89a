"""Hugging Face to Megatron: what is read, what is written, and what is said about it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_convert.errors import raise_together
from dist_convert.hf_dialects import hf_view, leftovers
from dist_convert.job import TARGET_DTYPES, ToMegatronJob
from dist_convert.layout import SHARD_FILE, Chunk, Grid, is_rank_directory, place_chunks, rank_directory
from dist_convert.metadata.capacity_bins import FILE as BINS_FILE
from dist_convert.metadata.capacity_bins import bins_of_rank, load_bins, packed
from dist_convert.metadata.hf_architecture import architecture_from_config, config_vocab
from dist_convert.metadata.target_args import (
    TargetArgs,
    describe_origins,
    padded_vocab,
    read_margs,
    target_args,
    target_margs_json,
)
from dist_convert.models import FAMILIES
from dist_convert.models.architecture import Architecture
from dist_convert.move.exchange import World, gather_objects
from dist_convert.move.pipeline import Moved
from dist_convert.old_flags import check_model_size
from dist_convert.plan.content import Content
from dist_convert.plan.stages import check_target, layout_stages, notes_on_target, stage_layers
from dist_convert.plan.target_shards import TargetDialect, lay_out_shards, written_ranks
from dist_convert.plan.to_megatron import find_parts, plan_to_megatron, target_dtypes
from dist_convert.read.discover import discover
from dist_convert.read.hub import local_directory
from dist_convert.read.huggingface import (
    HuggingFaceFiles,
    check_index,
    headers_from_json,
    headers_to_json,
    read_directory,
    read_index,
    read_weights_header,
)
from dist_convert.read.megatron_shard import Shard
from dist_convert.records import StoredTensor, TensorSpec
from dist_convert.report import human_notes
from dist_convert.task import Task
from dist_convert.write.megatron_files import lay_out_skeleton, write_skeleton
from dist_convert.write.seal import seal
from dist_convert.write.tracker import replace_text, write_tracker

ARGS_FILE = "target_megatron_args.json"
_CONFIG = "config.json"

#: Values that are in the target beside the weights: (file, name) -> bytes.
Extras = Mapping[tuple[str, str], bytes]


@dataclass(frozen=True)
class _Target:
    """A Megatron checkpoint to be made: its model, grid, layers by chunk, args, and the tensors of each file."""

    architecture: Architecture
    grid: Grid
    chunks: tuple[Chunk, ...]
    args: TargetArgs
    files: Mapping[str, tuple[tuple[TensorSpec, ...], ...]]
    extras: Extras


def hf_to_megatron(job: ToMegatronJob, world: World) -> Task:
    """Read the model's headers and work out the Megatron checkpoint that it becomes.

    Raises:
        SourceError, UsageError: all that the headers and flags show to be wrong.
    """
    directory = _fetch(job, world)
    seen = read_directory(directory)
    found = discover(
        world,
        seen.sizes_bytes,
        lambda file: headers_to_json({file: read_weights_header(directory / file, file)}),
        expected=f"safetensors or pytorch_model files in {directory}",
    )
    headers = {file: headers_from_json(header)[file] for file, header in found.headers.items()}
    index = read_index(directory)
    if index is not None:
        check_index(index, headers)
    stored = {name: tensor for tensors in headers.values() for name, tensor in tensors.items()}
    target, content = _plan(job, directory, seen, stored)
    iteration = None if job.release else job.iteration
    name = "release" if iteration is None else f"iter_{iteration:07d}"

    def make_files(partial: Path) -> None:
        for file, specs in target.files.items():
            write_skeleton(partial / file, target.args.values, iteration or 0, specs)

    def finish(partial: Path, moved: Moved) -> None:
        ranges = [tuple(r) for of_rank in gather_objects(world, moved.checksums) for r in of_rank]
        for number, file in enumerate(sorted(target.files)):
            if number % world.size == world.rank:
                _write_extras(partial, file, content, target.extras)
                seal(partial, file, [(f, offset, size, crc) for f, offset, size, crc in ranges if f == file])

    def publish() -> None:
        replace_text(job.save_dir / ARGS_FILE, target_margs_json(target.args))
        write_tracker(job.save_dir, iteration)

    return Task(
        content=content,
        source=directory,
        visible=found.visible,
        target=job.save_dir / name,
        is_replaceable=lambda path: any(is_rank_directory(inside.name) for inside in path.iterdir()),
        notes=_notes(job, target, content),
        make_files=make_files,
        finish=finish,
        publish=publish,
    )


def _fetch(job: ToMegatronJob, world: World) -> Path:
    """The model's directory. Rank 0 asks a hub, one rank of each machine fetches the same revision, all find it."""
    if Path(job.load_dir).is_dir():
        return Path(job.load_dir)
    repository = job.load_dir.partition("@")[0]
    commit = gather_objects(world, local_directory(job.load_dir).name if world.rank == 0 else None)[0]
    if world.local_rank == 0:
        local_directory(f"{repository}@{commit}")
    gather_objects(world, None)
    return local_directory(f"{repository}@{commit}")


def _plan(
    job: ToMegatronJob, directory: Path, seen: HuggingFaceFiles, stored: Mapping[str, StoredTensor]
) -> tuple[_Target, Content]:
    architecture, grid, stages = _model_and_grid(job, seen)
    parts = find_parts(
        architecture,
        lambda name, layer, expert, rows, columns: hf_view(
            name, layer, expert, stored, rows, columns, experts=architecture.experts
        ),
    )
    left_behind, unknown = leftovers(
        stored,
        {view.tensor for view in parts.values()},
        hf_class=FAMILIES[architecture.family].hf_class,
        tied=architecture.tied,
    )
    raise_together(unknown)
    wanted = TARGET_DTYPES[job.target_params_dtype]
    params_dtype, dtypes = target_dtypes(architecture, parts, wanted)
    target = _target(job, directory, architecture, grid, stages, wanted or params_dtype, dtypes)
    content = plan_to_megatron(
        parts,
        {file: _header(target, job, file) for file in target.files},
        architecture,
        grid,
        params_dtype=params_dtype,
        target_dtype=wanted,
        repeat_last_row=job.vocab_padding == "last-row",
        extras=frozenset(target.extras),
        left_behind=left_behind,
    )
    return target, content


def _model_and_grid(
    job: ToMegatronJob, seen: HuggingFaceFiles
) -> tuple[Architecture, Grid, tuple[tuple[int, ...], ...]]:
    tensor, pipeline = job.target_tensor_parallel_size, job.target_pipeline_parallel_size
    vocab = config_vocab(seen.config, file=_CONFIG)
    padded = padded_vocab(vocab, job.make_vocab_size_divisible_by, tensor)
    architecture = architecture_from_config(seen.config, padded_vocab=padded, file=_CONFIG)
    check_model_size(job.model_size, architecture)
    layout = job.pipeline_model_parallel_layout
    virtual = layout_stages(layout) // pipeline if layout else job.target_virtual_pipeline_parallel_size
    grid = Grid(
        tensor,
        pipeline,
        virtual,
        job.target_expert_parallel_size if architecture.experts else 1,
        (job.target_expert_tensor_parallel_size or tensor) if architecture.experts else tensor,
    )
    first, last = job.decoder_first_pipeline_num_layers, job.decoder_last_pipeline_num_layers
    check_target(architecture, grid, first=first, last=last, layout=layout)
    stages = stage_layers(architecture.layers, pipeline, virtual, first=first, last=last, layout=layout)
    return architecture, grid, stages


def _target(
    job: ToMegatronJob,
    directory: Path,
    architecture: Architecture,
    grid: Grid,
    stages: tuple[tuple[int, ...], ...],
    params_dtype: str,
    dtypes: Mapping[str, str],
) -> _Target:
    args = target_args(
        architecture,
        grid=grid,
        stages=stages,
        params_dtype=params_dtype,
        iteration=None if job.release else job.iteration,
        vocab=architecture.vocab,
        make_vocab_size_divisible_by=job.make_vocab_size_divisible_by,
        margs=read_margs(job.source_margs_file) if job.source_margs_file else None,
        tokenizer_model=job.tokenizer_model and os.path.abspath(job.tokenizer_model),
        tokenizer_type=job.tokenizer_type,
        transformer_impl=job.saver_transformer_impl,
        expert_layout=job.expert_layout,
        first=job.decoder_first_pipeline_num_layers,
        last=job.decoder_last_pipeline_num_layers,
        layout=job.pipeline_model_parallel_layout,
    )
    layers_of = {(p, v): stages[v][p] for v in range(grid.virtual_pipeline) for p in range(grid.pipeline)}
    chunks = place_chunks(grid, layers_of)
    dialect = TargetDialect(job.saver_transformer_impl, job.expert_layout)
    files = lay_out_shards(architecture, FAMILIES[architecture.family], grid, chunks, dialect, dtypes)
    if not job.load_capacity_bins:
        return _Target(architecture, grid, chunks, args, files, {})
    bins = load_bins(directory / BINS_FILE)
    extras: dict[tuple[str, str], bytes] = {}
    for rank in written_ranks(grid):
        file = f"{rank_directory(grid, rank)}/{SHARD_FILE}"
        for virtual, tensors in bins_of_rank(bins, rank, chunks).items():
            specs = tuple((name, dtype, (len(values),)) for name, (dtype, values) in sorted(tensors.items()))
            models = files[file]
            files[file] = (*models[:virtual], models[virtual] + specs, *models[virtual + 1 :])
            label = "" if len(models) == 1 else f"model{virtual}."
            extras |= {(file, label + name): packed(dtype, values) for name, (dtype, values) in tensors.items()}
    return _Target(architecture, grid, chunks, args, files, extras)


def _header(target: _Target, job: ToMegatronJob, file: str) -> Shard:
    """What `read_shard` will find in a file of the target."""
    iteration = 0 if job.release else job.iteration
    skeleton = lay_out_skeleton(target.args.values, iteration, target.files[file], file)
    weights_bytes = sum(tensor.size_bytes for chunk in skeleton.chunks for tensor in chunk.values())
    nothing: dict[str, str] = {}
    return Shard(
        file, skeleton.size_bytes, weights_bytes, iteration, dict(target.args.values), skeleton.chunks,
        (nothing,) * len(skeleton.chunks),
    )  # fmt: skip


def _write_extras(partial: Path, file: str, content: Content, extras: Extras) -> None:
    tensors = {tensor.name: tensor for target in content.files if target.name == file for tensor in target.tensors}
    wanted = {name: data for (of_file, name), data in extras.items() if of_file == file}
    with (partial / file).open("r+b") as output:
        for name, data in wanted.items():
            output.seek(tensors[name].offset_bytes)
            output.write(data)


def _notes(job: ToMegatronJob, target: _Target, content: Content) -> Sequence[str]:
    notes = [*notes_on_target(target.architecture, target.grid), *human_notes(content)]
    if job.verbose:
        notes.append(describe_origins(target.args))
    return notes
