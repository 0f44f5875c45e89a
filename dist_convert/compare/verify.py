"""`dist-convert verify A B`, and `--verify` of a conversion: do two checkpoints hold the same model?

read headers -> name every tensor and where it lies -> deal blocks to ranks -> read and compare -> report
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from dist_convert.compare.blocks import Amount, deal
from dist_convert.compare.catalog import Checkpoint
from dist_convert.compare.compare import Compared, Difference, check_budget, compare
from dist_convert.compare.open import checkpoints, open_named
from dist_convert.compare.outcome import Outcome, describe_sample, differences, outcome_of
from dist_convert.errors import DifferentModel, PlanError, UsageError
from dist_convert.formats.format import Model
from dist_convert.formats.open import settled, where_of
from dist_convert.models.catalog import Where
from dist_convert.options import SAMPLE, Options, VerifyJob
from dist_convert.ranks.channel import Control
from dist_convert.ranks.collectives import World, agree, gather_objects
from dist_convert.write.partial import refuse_unfinished
from dist_convert.write.task import Task


def verify(job: VerifyJob, world: World, channel: Control) -> Outcome:
    """Compare two checkpoints, together with all other ranks; every rank gets the same outcome.

    Raises:
        ConversionError: see `errors`; a checkpoint that is incomplete, damaged or of no supported model.
    """
    check_budget(job.max_memory_per_rank_bytes)
    wheres = [
        Where(
            job.a,
            job.ckpt_dir_name_a,
            job.habana_imported_experts_a,
            job.true_vocab_size,
            name_flag="--ckpt-dir-name-a",
        ),
        Where(
            job.b,
            job.ckpt_dir_name_b,
            job.habana_imported_experts_b,
            job.true_vocab_size,
            name_flag="--ckpt-dir-name-b",
        ),
    ]
    for where in wheres:
        refuse_unfinished(where.path, where.ckpt_dir_name)
    opened = [open_named(letter, where, world) for letter, where in zip("AB", wheres, strict=True)]
    a, b = checkpoints(opened[0], opened[1], world)
    work = work_of(a, b, job.sample)

    def progress(size_bytes: int) -> None:
        channel.add_progress(size_bytes)
        channel.doing("comparing")

    with channel.progress(work.size_bytes, "comparing"):
        return compare_all(a, b, work, world, progress)


@dataclass(frozen=True)
class Work:
    """What all ranks compare together.

    Attributes:
        sample: share of the blocks.
        tensors: names of those that have blocks.
        amount: of all blocks.
        size_bytes: that are read for it.
        digest: of who compares what.
    """

    sample: Fraction
    tensors: tuple[str, ...]
    amount: Amount
    size_bytes: int
    digest: str


def work_of(a: Checkpoint, b: Checkpoint, sample: Fraction) -> Work:
    """Count what there is to compare, before anything is read.

    Raises:
        UsageError: no rank sees all files that a block needs.
    """
    tensors: dict[str, None] = {}
    amount, size_bytes, digest = Amount(), 0, hashlib.sha256()
    for rank, block in deal(a, b, sample):
        tensors[block.tensor] = None
        amount += block.amount
        size_bytes += block.size_bytes
        digest.update(f"{rank} {block.tensor} {block.box} {block.size_bytes}\n".encode())
    return Work(sample, tuple(tensors), amount, size_bytes, digest.hexdigest())


def compare_all(a: Checkpoint, b: Checkpoint, work: Work, world: World, on_compared: Callable[[int], None]) -> Outcome:
    """Compare this rank's blocks and put together what all ranks found; every rank gets the same outcome.

    Raises:
        SourceError: a file that ends early, or cannot be read.
        PlanError: ranks disagree about the work, or not all of it was done.
    """
    agree(world, work.digest)
    mine = (block for rank, block in deal(a, b, work.sample) if rank == world.rank)
    compared = [_from_json(data) for data in gather_objects(world, _to_json(compare(a, b, mine, on_compared)))]
    done = sum((of_rank.amount for of_rank in compared), Amount())
    if done != work.amount:
        raise PlanError("not everything was compared", expected=work.amount, found=done)
    return outcome_of(a, b, compared, work.tensors, work.sample)


def _to_json(compared: Compared) -> dict[str, Any]:
    return {
        "amount": asdict(compared.amount),
        "differences": [asdict(found) for found in compared.differences.values()],
    }


def _from_json(data: dict[str, Any]) -> Compared:
    compared = Compared(Amount(**data["amount"]))
    for found in data["differences"]:
        row, column = found["index"]
        pairs = {name: tuple(found[name]) for name in ("values", "files")}
        compared.add(Difference(**{**found, **pairs, "index": (row, column)}))
    return compared


_SHOWN = 8


@dataclass(frozen=True)
class Check:
    """A comparison of a conversion's target with its source that has been prepared.

    Attributes:
        source: its headers, read anew: nothing of the conversion's plan is used.
        sample: share of the blocks.
    """

    source: Model
    sample: Fraction


def prepare_check(job: Options, task: Task, world: World) -> Check | None:
    """Get ready to compare a conversion's target with its source; None where that was not asked for.

    Raises:
        BudgetTooSmall, UsageError: the comparison could not be made.
    """
    if job.verify is None:
        return None
    check_budget(job.max_memory_per_rank_bytes)
    _check_sights(task)
    where = where_of(job, task.source)
    source = open_named("source", where, world)
    if where.accept_differing_copies:
        source = settled(source, where, world)
    return Check(source, SAMPLE if job.verify == "sample" else Fraction(1))


def compare_with_source(check: Check, task: Task, directory: Path, world: World) -> str:
    """Compare what lies in a directory with what it was made from, on every rank; says what was compared.

    Raises:
        DifferentModel: they are not the same model.
        SourceError: a file cannot be read, or is damaged.
    """
    target = open_named("target", Where(directory), world)
    a, b = checkpoints(check.source, target, world, is_shared=not any(task.places))
    outcome = compare_all(a, b, work_of(a, b, check.sample), world, lambda _: None)
    if not outcome.is_same:
        raise _different(task, directory, outcome)
    return _line(task, outcome)


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
