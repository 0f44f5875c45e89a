"""A whole conversion on one screen. Start reading here.

    read headers -> plan -> (read bytes -> gather -> place -> write bytes)* -> checks -> commit

`formats` opens the source, whatever it is; `to_huggingface` and `to_megatron` say what is made of it; `plan` intersects
both ends and deals the copies to ranks, `move` carries them out, `write` makes the target and gives it its name.
"""

import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from functools import partial

from dist_convert.compare.verify import compare_with_source, prepare_check
from dist_convert.errors import PlanError, SourceError, shown_line
from dist_convert.formats.huggingface.lay_out import to_huggingface
from dist_convert.formats.open import open_source
from dist_convert.formats.to_megatron import to_megatron
from dist_convert.move import report as reports
from dist_convert.move.pipeline import MoveResult, move, value_overflow
from dist_convert.move.timeline import Timeline, traced
from dist_convert.options import DCP, FSDP_DTENSOR, MEGATRON, TORCH_DCP, TORCH_DIST, Options, check_applies, formats_of
from dist_convert.plan.plan import NOTHING_WRITTEN, Plan, WrittenRanges, check_groups, divide, schedule_digest
from dist_convert.ranks.channel import Control
from dist_convert.ranks.collectives import World, agree, barrier, gather_objects, run_on
from dist_convert.records import counted, human_bytes, local_name, warnings_of
from dist_convert.write import resume
from dist_convert.write.checksums import KnownRanges
from dist_convert.write.commit import commit, publish, remove_leftovers
from dist_convert.write.files import Directory, target_error
from dist_convert.write.journal import CHANGES
from dist_convert.write.manifest import file_record, known_ranges, write_manifest
from dist_convert.write.target_disks import spread_files
from dist_convert.write.task import Task, find_writers


def convert(job: Options, world: World, channel: Control) -> reports.Report:
    """Convert a checkpoint, together with all other ranks; what was done is returned on every rank."""
    model = open_source(job, world)
    check_applies(job, model.format)
    task = (to_megatron if job.to in formats_of(MEGATRON) else to_huggingface)(job, model, world)
    job = task.job
    dealt = find_writers(task, world)
    plan = _divide(dealt, world, NOTHING_WRITTEN)

    check = prepare_check(job, task, world)
    free_bytes, replaces = resume.check_start(task) if task.is_first else (0, "")
    notes = (*dealt.notes, *resume.notes_on_replacing(task))
    report = reports.Report(
        source=task.source.directory,
        target=task.target,
        source_format=task.source.format,
        target_format=job.to,
        left_behind=task.content.left_behind,
        notes=notes,
        files=len(task.content.files),
        size_bytes=task.content.target_bytes,
    )
    channel.say("start", shown_line(reports.start_line(plan, report, len(set(world.nodes)))))
    for note in notes:
        channel.say("note", shown_line(note))
    if job.strict and (warnings := warnings_of(notes)):
        raise SourceError(f"--strict, and {counted(len(warnings), 'warning')}", found="; ".join(warnings))
    if job.dry_run:
        is_done = all(gather_objects(world, not task.is_first or resume.has_name(task)))
        loads = gather_objects(world, reports.load_of(plan, world))
        unfinished = task.partial if resume.is_unfinished(task) else None
        report = replace(report, was_complete=is_done, ranks=tuple(loads))
        report = replace(report, plan=reports.describe_plan(plan, free_bytes, report, unfinished))
        channel.say("plan", report.plan, report=reports.report_details(report))
        barrier(world)
        return report

    started = time.monotonic()
    with traced(job.trace, world, task.target) as timeline, resume.held_target(task, world) as held:
        if not held.is_complete:
            report = _make(task, dealt, plan, world, channel, timeline, report, held.directory)
        if check is not None:
            channel.say("verified", compare_with_source(check, task, held.directory.path, world, channel))
        channel.doing("renaming the target")
        # No disk speaks of the target before every disk has it.
        give_name = partial(commit, held.directory, held.parent, task.target, replaces=replaces)
        run_on(world, held.unnamed, give_name)
        target = replace(held.directory, path=task.target)
        if task.is_first:
            publish(target, held.parent, task.layout.beside())
        barrier(world)
        report = replace(report, seconds=time.monotonic() - started, was_complete=held.is_complete)
        if words := task.layout.next_step():
            channel.say("next_step", words)
        # The last thing of all: until then, the same command finds what is left to do.
        if task.is_first and (words := remove_leftovers(target, held.parent, task.layout.beside())):
            channel.say("note", words)
        channel.say("done", reports.report_text(report, verbose=job.verbose), report=reports.report_details(report))
    return report


def _divide(task: Task, world: World, written: WrittenRanges) -> Plan:
    """The plan of what is not written, the same on every rank.

    Without a wish, ranks gather where some rank cannot reach every file, and on accelerators, but for chunks of
    distributed checkpoints, which belong to no tensor parallel set; else they work alone.
    """
    reach_all = len(set(task.source.found.visible)) == len(set(task.disks)) == 1
    on_accelerator = world.device.type != "cpu"
    is_chunked = task.source.format in (TORCH_DIST, TORCH_DCP, FSDP_DTENSOR, DCP)
    may_gather = on_accelerator and not is_chunked
    usual = "gather" if may_gather or not reach_all else "direct"
    plan = divide(
        task.content,
        task.source.found.visible,
        placement=usual if task.job.placement == "auto" else task.job.placement,
        budget_bytes=task.job.max_memory_per_rank_bytes,
        writable=task.writable,
        on_accelerator=on_accelerator,
        written=written,
    )
    if on_accelerator and is_chunked:
        check_groups(plan)
    agree(world, schedule_digest(plan))
    return plan


def _make(
    task: Task, dealt: Task, plan: Plan, world: World, channel: Control, timeline: Timeline, report: reports.Report,
    directory: Directory,
) -> reports.Report:  # fmt: skip
    """Make the target below its partial directory, but for what earlier runs have made of it; the report with that."""
    content = task.content
    resume_state, journal = resume.begin(task, world, directory)
    written = WrittenRanges.of(window for window, _ in resume_state.written)
    with closing(journal):
        if (before := Counter(resume_state.changed["overflowed"])) and not task.job.allow_overflow:
            [(tensor, count)] = before.most_common(1)
            raise value_overflow(tensor, content.ends.target.params_dtype, count)
        if written.size_bytes:
            there = f"{human_bytes(written.size_bytes)} of {human_bytes(content.moved_bytes)}"
            channel.say("resumed", shown_line(f"{directory}: {there} are written already; resuming"))
            plan = _divide(dealt, world, written)
        with channel.progress(content.moved_bytes - written.size_bytes, "converting"), journal.marked():
            result = move(task, plan, world, directory, journal, channel, timeline)
            channel.doing("waiting for other ranks to write")
            outcomes = gather_objects(world, _my_outcome(result, timeline))
        report = report.with_outcomes([*outcomes, resume_state.changed])
        written_bytes = written.size_bytes + report.written_bytes
        if written_bytes != content.moved_bytes:
            raise PlanError("not every byte was written", expected=content.moved_bytes, found=written_bytes)

        channel.doing("completing files")
        known = known_ranges(world, result.windows, resume_state)
        try:
            task.layout.complete(directory, task.own_files, known, is_first=world.rank == 0)
        except OSError as error:
            raise target_error(error, error.filename or directory) from error
        _describe(directory, task, world, known)
        names = [local_name(file.name) for file in task.files]
        started = time.monotonic()
        run_on(world, world.first_ranks, partial(journal.sync, names))
    return replace(report, synced_seconds=time.monotonic() - started)


def _describe(directory: Directory, task: Task, world: World, known: KnownRanges) -> None:
    """Write the manifest on every disk, and what else a divided target has everywhere."""
    records = {
        file.name: file_record(directory, local_name(file.name), known.get(file.name, ())) for file in task.own_files
    }
    of_ranks = gather_objects(world, records)
    resume.check_source(task, world)
    every = frozenset(file.name for file in task.content.files)
    if task.is_first and (world.rank == 0 or not task.is_divided):
        named = every if task.is_divided else task.writable[world.rank]
        weights = {local_name(name): r for of_rank in of_ranks for name, r in of_rank.items() if name in named}
        write_manifest(directory, weights, resume.facts_of(task))
    if task.is_divided:
        spread_files(world, directory, every, receives=task.is_first and world.rank > 0)


def _my_outcome(result: MoveResult, timeline: Timeline) -> dict[str, object]:
    changed = {kind: Counter[str]() for kind in CHANGES}
    for kind, tensor, values in result.changed:
        changed[kind][tensor] += values
    return {
        **changed,
        "read_bytes": result.read_bytes,
        "gathered_bytes": result.gathered_bytes,
        "written_bytes": result.written_bytes,
        "peak_memory_bytes": reports.peak_memory_bytes(),
        "profile": {"moved": result.seconds, **timeline.seconds()},
    }
