"""A whole conversion on one screen. Start reading here.

    read headers -> plan -> (read bytes -> gather -> place -> write bytes)* -> checks -> commit

`formats` opens the source, whatever it is; `to_huggingface` and `to_torch` say what is made of it; `plan` intersects
both ends and deals the copies to ranks, `move` carries them out, `write` makes the target and gives it its name.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from dist_convert.compare.verify import compare_with_source, prepare_check
from dist_convert.errors import PlanError, ValueOverflow
from dist_convert.formats.huggingface.lay_out import to_huggingface
from dist_convert.formats.open import open_source
from dist_convert.formats.torch.lay_out import to_torch
from dist_convert.move.pipeline import Moved, move
from dist_convert.move.report import (
    Report,
    describe_plan,
    load_of,
    peak_memory_bytes,
    report_details,
    report_text,
    resume_line,
)
from dist_convert.move.timeline import Timeline, traced
from dist_convert.options import HUGGINGFACE, TORCH, Options, check_applies
from dist_convert.plan.content import Content
from dist_convert.plan.done import NOTHING_DONE, Done
from dist_convert.plan.plan import Plan, divide, schedule_digest
from dist_convert.ranks.channel import Control
from dist_convert.ranks.collectives import World, agree, barrier, gather_objects
from dist_convert.read.source import pushes_others_out
from dist_convert.records import local_name
from dist_convert.write.checksums import KnownRange
from dist_convert.write.commit import commit, settle, sweep, sync_files
from dist_convert.write.files import target_error
from dist_convert.write.journal import MARK_SECONDS, History
from dist_convert.write.manifest import file_record, known_ranges, write_manifest
from dist_convert.write.places import spread_files
from dist_convert.write.resume import (
    Held,
    Start,
    all_written,
    begin,
    check_source,
    check_start,
    facts_of,
    goes_on,
    has_name,
    held_target,
    notes_on_replacing,
)
from dist_convert.write.task import Task, Writers, find_writers


def convert(job: Options, world: World, channel: Control) -> Report:
    """Convert a checkpoint, together with all other ranks.

    Args:
        job: what to convert, and into which format.
        world: this rank among the others.
        channel: for progress, and for what takes longer than a collective waits.

    Returns:
        What was done, on every rank.

    Raises:
        ConversionError: see `errors`; nothing is left under the target's name.
    """
    model = open_source(job, world, channel)
    check_applies(job, HUGGINGFACE if model.args is None else TORCH)
    task = to_torch(job, model, world) if job.to == TORCH else to_huggingface(job, model, world)
    job = task.job
    placement = choose_placement(job.placement, world, task.visible, task.places)
    writers = find_writers(task, world)
    plan = _divide(task, writers, job, world, placement, NOTHING_DONE)

    check = prepare_check(job, task, world)
    is_first = task.is_first_of_place(world.rank)
    free_bytes = 0
    if is_first:
        free_bytes = check_start(task, job, world.rank)
    notes = (*task.notes, *writers.notes, *notes_on_replacing(task, job, world.rank))
    for note in notes:
        channel.say("note", note)
    report = Report(
        source=task.source,
        target=task.target,
        source_format=task.source_format,
        target_format=job.to,
        left_behind=task.content.left_behind,
        notes=notes,
    )
    if job.dry_run:
        is_done = any(gather_objects(world, is_first and has_name(task, job, world.rank)))
        loads: list[list[int]] = gather_objects(world, load_of(plan, world.rank))
        unfinished = task.partial if goes_on(task, job, world.rank) else None
        report = replace(report, was_complete=is_done)
        report = replace(report, plan=describe_plan(plan, loads, free_bytes, report, unfinished))
        channel.say("plan", report.plan, report=report_details(report))
        barrier(world)
        return report

    started = time.monotonic()
    with traced(job.trace, world, task.target) as timeline, held_target(task, job, world) as held:
        if not held.is_complete:
            done = _make(task, writers, job, plan, world, channel, timeline)
            facts = ("source", "target", "source_format", "target_format", "left_behind", "notes")
            report = replace(done, **{name: getattr(report, name) for name in facts})
        if check is not None:
            directory = task.target if held.has_name else task.partial
            channel.say("verified", compare_with_source(check, task, directory, world))
        channel.doing("giving the target its name")
        firsts = [rank for rank in range(world.size) if task.is_first_of_place(rank)]
        # No place speaks of the target before every place has it.
        channel.run_on(firsts, "commit", partial(_give_name, task, held, job), job.timeout_seconds)
        if is_first:
            task.layout.publish()
        barrier(world)
        report = replace(report, seconds=time.monotonic() - started, was_complete=held.is_complete)
        channel.say("done", report_text(report), report=report_details(report))
        if words := task.layout.to_do():
            channel.say("to do", words)
        if is_first:
            settle(task.target)  # the last thing of all: until then, the same command finds what is left to do
    if is_first:
        sweep(task.target)
    return report


def _give_name(task: Task, held: Held, job: Options) -> None:
    if not held.has_name:
        commit(task.partial, task.target, overwrite=job.overwrite)


def _divide(task: Task, writers: Writers, job: Options, world: World, placement: str, done: Done) -> Plan:
    """The plan of what is not done, the same on every rank."""
    plan = divide(
        writers.content,
        task.visible,
        placement=placement,
        budget_bytes=job.max_memory_per_rank_bytes,
        writable=writers.writable,
        on_accelerator=world.device.type != "cpu",
        done=done,
    )
    agree(world, schedule_digest(plan))
    return plan


def _make(
    task: Task,
    writers: Writers,
    job: Options,
    plan: Plan,
    world: World,
    channel: Control,
    timeline: Timeline,
) -> Report:
    """Make the target below its partial directory, but for what earlier runs have made of it."""
    content, directory = task.content, task.partial
    start = begin(task, world)
    with closing(start.journal) as journal:
        if start.done.size_bytes:
            channel.say("resumed", resume_line(directory, start.done.size_bytes, content.moved_bytes))
            plan = _divide(task, writers, job, world, plan.placement, start.done)
        left_bytes = content.moved_bytes - start.done.size_bytes
        with channel.progress(left_bytes, "converting"), journal.marked(MARK_SECONDS):
            node_bytes = 2 * content.moved_bytes * world.local_size // world.size
            moved = move(
                plan, world, task.source, task.source_listing, directory, journal, channel, timeline,
                is_last_use=pushes_others_out(node_bytes),
            )  # fmt: skip
            channel.doing("waiting for other ranks to write")
            outcomes = [*gather_objects(world, _my_outcome(moved, timeline)), _earlier_outcome(start.history)]
        _check_outcomes(job, content, start, outcomes)

        channel.doing("completing files")
        known = known_ranges(all_written(world, moved.windows, start.history))
        try:
            task.layout.complete(directory, task.my_share(world.rank), known, is_first=world.rank == 0)
        except OSError as error:
            raise target_error(error, str(error.filename or directory)) from error
        _describe(task, job, world, known)
        names = [local_name(file.name) for file in task.files_of(world.rank)]
        started = time.monotonic()
        channel.run_on(world.first_ranks, "sync", partial(sync_files, directory, names, journal), job.timeout_seconds)
    return replace(Report.of_ranks(outcomes), synced_seconds=time.monotonic() - started)


def _describe(task: Task, job: Options, world: World, known: Mapping[str, Sequence[KnownRange]]) -> None:
    """Write the manifest at every place, and what else a divided target has everywhere."""
    records = {
        file.name: file_record(task.partial / local_name(file.name), known.get(file.name, ()))
        for file in task.my_share(world.rank)
    }
    of_ranks: list[dict[str, Any]] = gather_objects(world, records)
    check_source(task, world)
    is_first = task.is_first_of_place(world.rank)
    if is_first and (world.rank == 0 or not task.is_divided):
        named = task.writable[world.rank] | task.elsewhere(world.rank)
        weights = {local_name(name): r for of_rank in of_ranks for name, r in of_rank.items() if name in named}
        write_manifest(task.partial, weights, facts_of(task, job, world.rank))
    if task.is_divided:
        weights_files = frozenset(file.name for file in task.content.files)
        spread_files(world, task.partial, weights_files, receives=is_first and world.rank > 0)


def choose_placement(wanted: str, world: World, visible: Sequence[frozenset[str]], places: Sequence[int] = (0,)) -> str:
    """`auto` gathers on accelerators and where some rank cannot reach every file; otherwise ranks work alone."""
    if wanted != "auto":
        return wanted
    reach_all = len(set(visible)) == len(set(places)) == 1
    return "direct" if world.device.type == "cpu" and reach_all else "gather"


def _my_outcome(moved: Moved, timeline: Timeline) -> dict[str, object]:
    return {
        "read_bytes": moved.counts.read_bytes,
        "gathered_bytes": moved.gathered_bytes,
        "written_bytes": moved.written_bytes,
        "peak_memory_bytes": peak_memory_bytes(),
        "overflowed": dict(moved.counts.overflowed),
        "rounded_norms": dict(moved.counts.rounded_norms),
        "profile": {"moved": moved.seconds, **timeline.seconds()},
    }


def _earlier_outcome(history: History) -> dict[str, object]:
    """What the last words of a conversion need of its earlier runs: the values that casts changed."""
    return {"read_bytes": 0, "gathered_bytes": 0, "written_bytes": 0, "peak_memory_bytes": 0, **history.changed}


def _check_outcomes(job: Options, content: Content, start: Start, outcomes: Sequence[dict[str, object]]) -> None:
    """Every byte of the plan must have been written, by this run or an earlier one, and no value lost its size.

    Raises:
        PlanError, ValueOverflow
    """
    total = Report.of_ranks(outcomes)
    written_bytes = start.done.size_bytes + total.written_bytes
    if written_bytes != content.moved_bytes:
        raise PlanError("not every byte was written", expected=content.moved_bytes, found=written_bytes)
    if total.overflowed and not job.allow_overflow:
        worst = max(total.overflowed, key=lambda name: total.overflowed[name])
        raise ValueOverflow(
            f"{sum(total.overflowed.values())} finite values in {len(total.overflowed)} tensors become infinite "
            f"in {job.target_params_dtype}",
            tensor=worst,
            found=f"{total.overflowed[worst]} values in this tensor",
            remedy="choose a --target-params-dtype with a wider range and start anew with --overwrite, or accept "
            "infinities with --allow-overflow",
        )
