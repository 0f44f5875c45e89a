"""`--verify` of a conversion: what was written is read back and compared with the source before it gets its name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from dist_convert.errors import DifferentModel, UsageError
from dist_convert.job import SAMPLE, Job, ToMegatronJob
from dist_convert.move.exchange import World
from dist_convert.task import Task
from dist_convert.verify.catalog import Which
from dist_convert.verify.compare import check_budget
from dist_convert.verify.outcome import Outcome, describe_sample, differences
from dist_convert.verify.verify import catalogs, compare_all, open_named, work_of

_SHOWN = 8


def prepare_check(job: Job | ToMegatronJob, task: Task, world: World) -> Callable[[Path], None]:
    """Get ready to compare a conversion's target with its source; the result does so, on every rank.

    Nothing of the conversion's plan is used: both sides are described anew from the headers of their files. The result
    takes the directory where the target is.

    Raises:
        BudgetTooSmall, UsageError: the comparison could not be made. The result raises `DifferentModel`.
    """
    if job.verify is None:
        return lambda _: None
    check_budget(job.max_memory_per_rank_bytes)
    _check_sights(task)
    sample = SAMPLE if job.verify == "sample" else Fraction(1)
    which = Which(task.source)
    if isinstance(job, Job):
        which = Which(
            task.source,
            habana_imported_experts=job.habana_imported_experts,
            true_vocab_size=job.true_vocab_size,
            tokenizer=job.tokenizer,
        )
    source = open_named("source", which, world)

    def check(directory: Path) -> None:
        a, b = catalogs(source, open_named("target", Which(directory, is_shared=not any(task.places)), world))
        outcome = compare_all(a, b, work_of(a, b, sample), world, lambda _: None)
        if not outcome.is_same:
            raise _different(task, directory, outcome)
        if world.rank == 0:
            print(_line(task, outcome), file=sys.stderr)

    return check


def _check_sights(task: Task) -> None:
    """Refuse a target of which no node has all while it lacks some of the source: parts cannot be compared.

    Raises:
        UsageError: naming a file that some node lacks.
    """
    if not task.is_divided:
        return
    for place in sorted(set(task.places)):
        ranks = [rank for rank, of_rank in enumerate(task.places) if of_rank == place]
        best = max((task.visible[rank] for rank in ranks), key=len)
        missing = sorted(task.source_identity.keys() - best)
        if missing and task.writable[ranks[0]]:
            raise UsageError(
                "--verify cannot compare what lies on the disks of different nodes",
                file=missing[0],
                expected="with --save-per-node, every node sees the whole source",
                found=f"rank {ranks[0]} does not see this file",
                remedy="leave out --verify, copy the nodes' directories into one that all nodes see, and compare then: "
                "torchrun ... -m dist_convert verify SOURCE DIRECTORY",
            )


def _different(task: Task, directory: Path, outcome: Outcome) -> DifferentModel:
    found = differences(outcome)
    more = f"\n{'':12}and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    state, again = f"{task.partial.name} is kept for a look and never gets its name; the source", "convert again"
    if directory == task.target:
        state, again = "it may have been changed since it was made, or the source", "convert again with --overwrite"
    return DifferentModel(
        "what was written (B) is not the model that was read (A)",
        file=str(directory),
        expected="every tensor and config field alike",
        found=f"\n{'':12}".join(found[:_SHOWN]) + more,
        remedy=f"{state} or the target may lie on a failing disk: {again}, and report it if it stays",
    )


def _line(task: Task, outcome: Outcome) -> str:
    share = "" if outcome.sample == 1 else f" (a sample: {describe_sample(outcome)})"
    return (
        f"{task.target}: verified, {sum(outcome.tensors.values())} tensors with {outcome.amount.elements:,} "
        f"elements and {outcome.fields} config fields are the source's{share}"
    )
