"""`dist-convert verify A B`: do two checkpoints hold the same model?

read headers -> name every tensor and where it lies -> deal blocks to ranks -> read and compare -> report
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from dist_convert.channel import Channel
from dist_convert.errors import ConversionError, PlanError
from dist_convert.job import VerifyJob
from dist_convert.move.exchange import World, agree, gather_objects
from dist_convert.progress import show_progress
from dist_convert.read.directory import no_directory
from dist_convert.read.huggingface import CONFIG_FILE
from dist_convert.verify.blocks import Amount
from dist_convert.verify.catalog import Checkpoint, Opened, Which
from dist_convert.verify.compare import Compared, Difference, check_budget, compare
from dist_convert.verify.deal import deal
from dist_convert.verify.nodes import with_every_copy
from dist_convert.verify.open_huggingface import open_huggingface
from dist_convert.verify.open_megatron import open_megatron
from dist_convert.verify.outcome import Outcome, as_json, as_text, outcome_of
from dist_convert.write.unfinished import refuse_unfinished


def verify(job: VerifyJob, world: World, channel: Channel) -> int:
    """Compare two checkpoints, together with all other ranks; rank 0 prints the report.

    Returns:
        The exit code: 0 the same model, 1 a different one.

    Raises:
        ConversionError: see `errors`; a checkpoint that is incomplete, damaged or of no supported model.
    """
    check_budget(job.max_memory_per_rank_bytes)
    whiches = [
        Which(
            job.a,
            job.ckpt_dir_name_a,
            job.habana_imported_experts_a,
            job.true_vocab_size,
            name_flag="--ckpt-dir-name-a",
        ),
        Which(
            job.b,
            job.ckpt_dir_name_b,
            job.habana_imported_experts_b,
            job.true_vocab_size,
            name_flag="--ckpt-dir-name-b",
        ),
    ]
    for which in whiches:
        refuse_unfinished(which.path, which.ckpt_dir_name)
    opened = [open_named(letter, which, world) for letter, which in zip("AB", whiches, strict=True)]
    a, b = catalogs(*opened)
    work = work_of(a, b, job.sample)

    def progress(size_bytes: int) -> None:
        channel.add_progress(size_bytes)
        channel.doing("comparing")

    with show_progress(world, channel, work.size_bytes, "comparing"):
        outcome = compare_all(a, b, work, world, progress)
    if world.rank == 0:
        print(as_json(outcome) if job.json else as_text(outcome), flush=True)
    return 0 if outcome.is_same else 1


def open_named(letter: str, which: Which, world: World) -> Opened:
    """Read the headers of a checkpoint of either kind; errors say which of the two it is.

    Raises:
        SourceError: all that the headers show to be wrong.
    """
    try:
        if any(gather_objects(world, (which.path / CONFIG_FILE).is_file())):
            opened = open_huggingface(which.path, world)
        elif any(gather_objects(world, which.path.is_dir())):
            opened = open_megatron(which, world)
        else:
            raise no_directory(which.path, "checkpoint")
    except ConversionError as error:
        error.what = f"{letter} ({which.path}): {error.what}"
        raise
    if which.is_shared:
        return opened
    return Opened(opened.vocab, lambda vocab: with_every_copy(opened.catalog(vocab), world))


def catalogs(first: Opened, second: Opened) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints; one that does not say the size of its vocabulary takes the other's.

    Raises:
        SourceError: tensors that are missing, unknown or of another shape than the config says.
    """
    found = []
    for letter, mine, other in (("A", first, second), ("B", second, first)):
        try:
            found.append(mine.catalog(other.vocab))
        except ConversionError as error:
            error.what = f"{letter}: {error.what}"
            raise
    return found[0], found[1]


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
