"""A whole conversion on one screen. Start reading here.

    read headers -> plan -> (read bytes -> gather -> place -> write bytes)* -> checks -> commit

`read` finds the checkpoint and its headers, `plan` turns them into box copies and deals those to ranks, `move` carries
them out, `write` makes the target and gives it its name, `metadata` translates what is not a tensor. The two directions
differ in `megatron_to_hf.py` and `hf_to_megatron.py`, which say what is read and written; this file moves it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from dist_convert.channel import Channel
from dist_convert.errors import PlanError, ValueOverflow
from dist_convert.hf_to_megatron import hf_to_megatron
from dist_convert.job import Job, ToMegatronJob
from dist_convert.megatron_to_hf import megatron_to_hf
from dist_convert.move.exchange import World, agree, barrier, gather_objects
from dist_convert.move.pipeline import Moved, move
from dist_convert.plan.content import Content
from dist_convert.plan.node_local import local_name
from dist_convert.plan.plan import divide, schedule_digest
from dist_convert.progress import show_progress
from dist_convert.report import Outcome, describe_plan, load_of, outcome_line, peak_memory_bytes
from dist_convert.task import RunOptions
from dist_convert.verify.conversion import prepare_check
from dist_convert.write.commit import check_target, commit, new_partial, sync_files
from dist_convert.write.file_writer import target_error


def convert(job: Job | ToMegatronJob, world: World, channel: Channel) -> Outcome | None:
    """Convert a checkpoint, together with all other ranks.

    Args:
        job: what to convert, and in which direction.
        world: this rank among the others.
        channel: for progress, and for what takes longer than a collective waits.

    Returns:
        What was done, on every rank; None after a dry run.

    Raises:
        ConversionError: see `errors`; nothing is left under the target's name.
    """
    task = hf_to_megatron(job, world, channel) if isinstance(job, ToMegatronJob) else megatron_to_hf(job, world)
    content = task.content
    placement = choose_placement(job.placement, world, task.visible, task.places)
    plan = divide(
        content,
        task.visible,
        placement=placement,
        budget_bytes=job.max_memory_per_rank_bytes,
        writable=task.writable,
        on_accelerator=world.device.type != "cpu",
    )
    agree(world, schedule_digest(plan))

    check = prepare_check(job, task, world)
    is_first = task.is_first_of_place(world.rank)
    free_bytes = 0
    if is_first:
        free_bytes = check_target(
            task.target,
            task.source,
            is_replaceable=task.is_replaceable,
            overwrite=job.overwrite,
            needed_bytes=sum(file.size_bytes for file in task.files_of(world.rank)),
            flag=task.target_flag,
        )
    if world.rank == 0:
        for note in task.notes:
            print(note, file=sys.stderr)
    if job.dry_run:
        loads: list[list[int]] = gather_objects(world, load_of(plan, world.rank))
        if world.rank == 0:
            print(describe_plan(task.target, plan, loads, free_bytes))
        barrier(world)
        return None

    started = time.monotonic()
    if is_first:
        new_partial(task.partial)
        task.make_files(task.partial)
    barrier(world)
    with show_progress(world, channel, content.moved_bytes):
        moved = move(plan, world, task.source, task.partial, channel.add_progress)
        outcomes = gather_objects(world, _my_outcome(moved))
    _check_outcomes(job, content, outcomes)

    try:
        task.finish(task.partial, moved)
    except OSError as error:
        raise target_error(error, str(error.filename or task.partial)) from error
    if world.local_rank == 0:
        sync_files(task.partial, [local_name(file.name) for file in task.files_of(world.rank)])
    barrier(world)
    check()
    if is_first:
        commit(task.partial, task.target, overwrite=job.overwrite)
        task.publish()
    barrier(world)
    outcome = Outcome.of_ranks(outcomes, time.monotonic() - started)
    if world.rank == 0:
        print(outcome_line(task.target, outcome), file=sys.stderr)
        if task.last_words:
            print(task.last_words, file=sys.stderr)
    return outcome


def choose_placement(wanted: str, world: World, visible: Sequence[frozenset[str]], places: Sequence[int] = (0,)) -> str:
    """`auto` gathers on accelerators and where some rank cannot reach every file; otherwise ranks work alone."""
    if wanted != "auto":
        return wanted
    reach_all = len(set(visible)) == len(set(places)) == 1
    return "direct" if world.device.type == "cpu" and reach_all else "gather"


def _my_outcome(moved: Moved) -> dict[str, object]:
    return {
        "read_bytes": moved.counts.read_bytes,
        "gathered_bytes": moved.gathered_bytes,
        "written_bytes": moved.written_bytes,
        "peak_memory_bytes": peak_memory_bytes(),
        "overflowed": dict(moved.counts.overflowed),
        "rounded_norms": dict(moved.counts.rounded_norms),
    }


def _check_outcomes(job: RunOptions, content: Content, outcomes: Sequence[dict[str, object]]) -> None:
    """Every byte of the plan must have been written, and no value lost its size.

    Raises:
        PlanError, ValueOverflow
    """
    total = Outcome.of_ranks(outcomes, 0.0)
    if total.written_bytes != content.moved_bytes:
        raise PlanError("not every byte was written", expected=content.moved_bytes, found=total.written_bytes)
    if total.overflowed and not job.allow_overflow:
        worst = max(total.overflowed, key=lambda name: total.overflowed[name])
        raise ValueOverflow(
            f"{sum(total.overflowed.values())} finite values in {len(total.overflowed)} tensors become infinite "
            f"in {job.target_params_dtype}",
            tensor=worst,
            found=f"{total.overflowed[worst]} values in this tensor",
            remedy="choose a --target-params-dtype with a wider range, or accept infinities with --allow-overflow",
        )
