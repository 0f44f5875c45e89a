"""A whole conversion on one screen. Start reading here.

    read headers -> plan -> (read bytes -> gather -> place -> write bytes)* -> checks -> commit

`read` finds the checkpoint and its headers, `plan` turns them into box copies and deals those to ranks, `move` carries
them out, `write` makes the target and gives it its name, `metadata` translates what is not a tensor.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_convert.channel import Channel
from dist_convert.errors import CheckpointNotFound, InconsistentShards, PlanError, ValueOverflow
from dist_convert.job import TARGET_DTYPES, Job
from dist_convert.metadata.capacity_bins import Bin, read_bins
from dist_convert.metadata.megatron_args import architecture_from_args, true_vocab
from dist_convert.metadata.tokenizer import Tokenizer, find_tokenizer
from dist_convert.metadata.write import write_metadata
from dist_convert.move.exchange import World, agree, barrier, gather_objects
from dist_convert.move.pipeline import Moved, move
from dist_convert.plan.plan import Content, Plan, divide, plan_content, schedule_digest
from dist_convert.plan.survey import check_same_run
from dist_convert.progress import show_progress
from dist_convert.read.checkpoint import iteration_directory, rank_files
from dist_convert.read.megatron_shard import Shard, read_shard, shard_from_json, shard_to_json
from dist_convert.report import Outcome, describe_plan, notes_on, outcome_line, peak_memory_bytes
from dist_convert.write.commit import check_target, commit, prepare, sync_files


def convert(job: Job, world: World, channel: Channel) -> Outcome | None:
    """Convert a Megatron checkpoint to a Hugging Face directory, together with all other ranks.

    Args:
        job: what to convert.
        world: this rank among the others.
        channel: for progress.

    Returns:
        What was done, on every rank; None after a dry run.

    Raises:
        ConversionError: see `errors`; nothing is left under the target's name.
    """
    directory = iteration_directory(job.load_path, job.ckpt_dir_name)
    source = read_headers(directory, world)
    tokenizer = _share_tokenizer(job, world, source.shards)
    plan = make_plan(job, world, source, tokenizer)
    agree(world, schedule_digest(plan))

    free_bytes = 0
    if world.rank == 0:
        needed_bytes = plan.content.target_bytes
        free_bytes = check_target(job.save_path, directory, overwrite=job.overwrite, needed_bytes=needed_bytes)
        for note in notes_on(job, plan.content, source.shards, tokenizer):
            print(note, file=sys.stderr)
    if job.dry_run:
        bases_bytes: list[int] = gather_objects(world, peak_memory_bytes())
        if world.rank == 0:
            print(describe_plan(job, plan, bases_bytes, free_bytes))
        barrier(world)
        return None

    started = time.monotonic()
    if world.rank == 0:
        prepare(job.partial_path, plan.content.files)
    barrier(world)
    with show_progress(world, channel, plan.content.moved_bytes):
        moved = move(plan, world, directory, job.partial_path, channel.add_progress)
    outcomes = gather_objects(world, _my_outcome(moved))
    _check_outcomes(job, plan.content, outcomes)

    mine = [source.shards[file] for file in source.headers_of[world.rank]]
    bins: list[list[Bin]] = gather_objects(world, read_bins(directory, mine) if job.save_capacity_bins else [])
    if world.local_rank == 0:
        sync_files(job.partial_path, [file.name for file in plan.content.files])
    barrier(world)
    if world.rank == 0:
        write_metadata(job, plan.content, source.args, tokenizer, [bin for of_rank in bins for bin in of_rank])
        commit(job.partial_path, job.save_path, overwrite=job.overwrite)
    barrier(world)
    outcome = Outcome.of_ranks(outcomes, time.monotonic() - started)
    if world.rank == 0:
        print(outcome_line(job, outcome), file=sys.stderr)
    return outcome


@dataclass(frozen=True)
class Source:
    """The checkpoint as all ranks together see it.

    Attributes:
        shards: every header, by file.
        visible: for each rank, the files that it can read.
        headers_of: for each rank, the files whose headers it read.
    """

    shards: dict[str, Shard]
    visible: tuple[frozenset[str], ...]
    headers_of: tuple[tuple[str, ...], ...]

    @property
    def args(self) -> dict[str, object]:
        return self.shards[min(self.shards)].args


def read_headers(directory: Path, world: World) -> Source:
    """Read each header on one rank that sees the file, and give all of them to all ranks.

    Raises:
        CheckpointNotFound: no rank sees any rank file.
        InconsistentShards: two ranks see files of different sizes under one name, or shards of different runs.
    """
    listings: list[dict[str, int]] = gather_objects(world, rank_files(directory))
    sizes_bytes: dict[str, int] = {}
    for rank, listing in enumerate(listings):
        for file, size_bytes in listing.items():
            if sizes_bytes.setdefault(file, size_bytes) != size_bytes:
                raise InconsistentShards(
                    "two ranks see different files under one name",
                    file=file,
                    expected=f"{sizes_bytes[file]} bytes",
                    found=f"{size_bytes} bytes on rank {rank}",
                    remedy="nodes hold shards of different runs; remove the wrong ones",
                )
    if not sizes_bytes:
        raise CheckpointNotFound(
            "no rank directories", file=str(directory), expected="mp_rank_00/model_optim_rng.pt", found="none"
        )
    headers_of = deal_headers(sorted(sizes_bytes), listings)
    mine = [shard_to_json(read_shard(directory / file, file)) for file in headers_of[world.rank]]
    shards = [shard_from_json(shard) for of_rank in gather_objects(world, mine) for shard in of_rank]
    check_same_run(shards)
    return Source(
        {shard.file: shard for shard in shards}, tuple(frozenset(listing) for listing in listings), headers_of
    )


def deal_headers(files: Sequence[str], listings: Sequence[dict[str, int]]) -> tuple[tuple[str, ...], ...]:
    """Give each file to the rank, of those that see it, that has the fewest so far."""
    dealt: list[list[str]] = [[] for _ in listings]
    for file in files:
        seeing = [rank for rank, listing in enumerate(listings) if file in listing]
        dealt[min(seeing, key=lambda rank: len(dealt[rank]))].append(file)
    return tuple(tuple(of_rank) for of_rank in dealt)


def _share_tokenizer(job: Job, world: World, shards: dict[str, Shard]) -> Tokenizer:
    """Rank 0's view of the tokenizer: its path may exist there only, and all ranks must plan alike."""
    args = shards[min(shards)].args
    found = find_tokenizer(job.tokenizer, args) if world.rank == 0 else Tokenizer(None)
    size, bos, eos, note = gather_objects(world, [found.size, found.bos, found.eos, found.note])[0]
    return Tokenizer(found.directory, size, bos, eos, note)


def make_plan(job: Job, world: World, source: Source, tokenizer: Tokenizer) -> Plan:
    """The plan that follows from the headers; every rank makes the same one."""
    file = min(source.shards)
    args = source.shards[file].args
    architecture = architecture_from_args(args, vocab=None, file=file)
    vocab, _ = true_vocab(
        flag=job.true_vocab_size, args=args, tokenizer=tokenizer.size, padded=architecture.padded_vocab, file=file
    )
    content = plan_content(
        source.shards,
        architecture_from_args(args, vocab=vocab, file=file),
        target_dtype=TARGET_DTYPES[job.target_params_dtype],
        max_shard_size_bytes=job.max_shard_size_bytes,
        imported_experts=job.habana_imported_experts,
    )
    return divide(
        content,
        source.visible,
        placement=choose_placement(job.placement, world, source.visible),
        budget_bytes=job.max_memory_per_rank_bytes,
    )


def choose_placement(wanted: str, world: World, visible: Sequence[frozenset[str]]) -> str:
    """`auto` gathers on accelerators and where some rank cannot see every file; otherwise ranks work alone."""
    if wanted != "auto":
        return wanted
    return "direct" if world.device.type == "cpu" and len(set(visible)) == 1 else "gather"


def _my_outcome(moved: Moved) -> dict[str, object]:
    return {
        "read_bytes": moved.counts.read_bytes,
        "gathered_bytes": moved.gathered_bytes,
        "written_bytes": moved.written_bytes,
        "peak_memory_bytes": peak_memory_bytes(),
        "overflowed": dict(moved.counts.overflowed),
        "rounded_norms": dict(moved.counts.rounded_norms),
    }


def _check_outcomes(job: Job, content: Content, outcomes: Sequence[dict[str, object]]) -> None:
    """Every byte of the plan must have been written, and no value lost its size.

    Raises:
        PlanError, ValueOverflow
    """
    total = Outcome.of_ranks(outcomes, 0.0)
    zero_bytes = sum(t.size_bytes for file in content.files for t in file.tensors if t.name in content.zero_tensors)
    weights_bytes = sum(tensor.size_bytes for file in content.files for tensor in file.tensors)
    if total.written_bytes + zero_bytes != weights_bytes:
        raise PlanError("not every byte was written", expected=weights_bytes - zero_bytes, found=total.written_bytes)
    if total.overflowed and not job.allow_overflow:
        worst = max(total.overflowed, key=lambda name: total.overflowed[name])
        raise ValueOverflow(
            f"{sum(total.overflowed.values())} finite values in {len(total.overflowed)} tensors become infinite "
            f"in {job.target_params_dtype}",
            tensor=worst,
            found=f"{total.overflowed[worst]} values in this tensor",
            remedy="use --target-params-dtype bf16, or accept infinities with --allow-overflow",
        )
