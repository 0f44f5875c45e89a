"""Holds a target while it is made, and what is left to say of an unfinished one when an error ends that.

The mark `resumable` says to job scripts that starting the same command again may be all it takes. It stays behind
whoever is killed. A rank that ends with an error takes it away where somebody has to do something first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_convert.errors import (
    RESUME,
    ConversionError,
    DifferentModel,
    Interrupted,
    LostRank,
    SourceChanged,
    ValueOverflow,
)
from dist_convert.job import Job, ToMegatronJob
from dist_convert.move.exchange import World, gather_objects
from dist_convert.resume import has_name, identity_of
from dist_convert.task import Task
from dist_convert.write.history import has_written, journals, last_run
from dist_convert.write.partial import RESUMABLE, claim, is_ours, note_void


@dataclass(frozen=True)
class Held:
    """What is known of a target that this conversion holds.

    Attributes:
        is_complete: nothing is left to be written: at some place it has its name already.
        has_name: at this rank's place.
    """

    is_complete: bool
    has_name: bool


@contextlib.contextmanager
def held_target(task: Task, job: Job | ToMegatronJob, world: World) -> Iterator[Held]:
    """Hold the target for this conversion; errors inside say how to go on with it.

    Raises:
        TargetBusy, ResumeRefused, TargetExists, TargetError: see `partial.claim`.
    """
    lock, is_here, runs_before = None, False, 0
    is_named = task.is_first_of_place(world.rank) and has_name(task, job, world.rank)
    if task.is_first_of_place(world.rank) and (not is_named or is_ours(task.target)):
        lock = claim(task.target, identity_of(task, job, world.rank), overwrite=job.overwrite)
    try:
        named = gather_objects(world, is_named)
        has_its_name = named[task.places.index(task.places[world.rank])]
        is_here, runs_before = not has_its_name, last_run(journals(task.partial))
        yield Held(any(named), has_its_name)
    except ConversionError as error:
        if not isinstance(error, ValueOverflow | DifferentModel | SourceChanged):
            error.resume = RESUME
        with contextlib.suppress(OSError):  # the same disk may refuse this too
            if is_here:
                _leave(task.partial, error, runs_before)
        raise
    finally:
        if lock is not None:
            lock.release()


def _leave(partial: Path, error: ConversionError, runs_before: int) -> None:
    """Say beside what is unfinished what may become of it; any rank that sees it may."""
    if isinstance(error, DifferentModel | SourceChanged):
        note_void(partial, is_void=True)
    if not _may_pass(error, partial, runs_before):
        (partial / RESUMABLE).unlink(missing_ok=True)


def _may_pass(error: ConversionError, partial: Path, runs_before: int) -> bool:
    """Whether the next run may get further though nobody does anything.

    A fault of a disk or of a network may be over then; of one that stays, each run that meets it has less left to write
    before it, until one has nothing.
    """
    if isinstance(error, Interrupted | LostRank):
        return True
    return isinstance(error.__cause__, OSError) and has_written(partial, runs_before)
