"""`dist-convert verify A B`, and `--verify` of a conversion: do two checkpoints hold the same model?

read headers -> name every tensor and where it lies -> deal blocks to ranks -> read and compare -> report

Files of one name on the disks of several nodes are each a copy of its own, and compared where they lie.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

from dist_convert.compare.blocks import Amount, Checkpoint, Work, deal, work_of
from dist_convert.compare.compare import Compared, Difference, check_budget, compare
from dist_convert.compare.elements import check_elements
from dist_convert.compare.outcome import Outcome, describe_sample, differences, outcome_of
from dist_convert.errors import DifferentModel, PlanError, UsageError, called, shown_line
from dist_convert.formats.format import MegatronModel, Model
from dist_convert.formats.huggingface.read import is_huggingface
from dist_convert.formats.megatron.parameters import MegatronCatalog
from dist_convert.formats.open import open_checkpoint, read_like
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.models import FAMILIES
from dist_convert.models.catalog import NOTHING_ASKED, Where
from dist_convert.options import SAMPLE, Options, VerifyJob
from dist_convert.ranks.channel import Control
from dist_convert.ranks.collectives import World, agree, gather_objects
from dist_convert.read.source import Listing
from dist_convert.records import counted, name_at
from dist_convert.write.partial import refuse_unfinished
from dist_convert.write.task import Task


def verify(job: VerifyJob, world: World, channel: Control) -> Outcome:
    """Compare two checkpoints, together with all other ranks; every rank gets the same outcome.

    Raises:
        ConversionError: see `errors`; a checkpoint that is incomplete, damaged or of no supported model.
    """
    check_budget(job.max_memory_per_rank_bytes)
    like, asked = read_like(job.like, world), replace(NOTHING_ASKED, true_vocab_size=job.true_vocab_size)
    of_a = replace(asked, ckpt_dir_name=job.ckpt_dir_name_a, habana_imported_experts=job.habana_imported_experts_a)
    of_b = replace(asked, ckpt_dir_name=job.ckpt_dir_name_b, habana_imported_experts=job.habana_imported_experts_b)
    for path, side in ((job.a, of_a), (job.b, of_b)):
        refuse_unfinished(path, side.ckpt_dir_name)
    first, second = _open_both(
        Where(job.a, of_a, like, is_compared=True, name_flag="--ckpt-dir-name-a"),
        Where(job.b, of_b, like, is_compared=True, name_flag="--ckpt-dir-name-b"),
        world,
    )
    a, b = _checkpoints(first, second, world)
    return compare_all(a, b, work_of(a, b, job.sample), world, channel)


def _open_both(a: Where, b: Where, world: World) -> tuple[Model, Model]:
    """Read the headers of two checkpoints; one whose args leave the family open is taken to be of the other's."""
    if any(gather_objects(world, is_huggingface(b.path))):
        second = _open("B", b, world)
        return _open("A", replace(a, family=_family(second)), world), second
    first = _open("A", a, world)
    return first, _open("B", replace(b, family=_family(first)), world)


def _family(model: Model) -> str | None:
    """The family that a config.json names."""
    named = (model.config or {}).get("model_type")
    return named if named in FAMILIES else None


def _open(letter: str, where: Where, world: World) -> Model:
    """Read the headers of a checkpoint; errors say which of the two it is."""
    with called(f"{letter} ({where.path})"):
        return open_checkpoint(where, world)


def _checkpoints(first: Model, second: Model, world: World) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints; one that does not say the size of its vocabulary takes the other's."""
    with called("A"):
        a = _checkpoint(first, second.vocab, world)
    with called("B"):
        b = _checkpoint(second, first.vocab, world)
    return _with_copies(a, first.found.listings), _with_copies(b, second.found.listings)


def _checkpoint(model: Model, vocab: int | None, world: World) -> Checkpoint:
    catalog, _ = model.catalog(vocab, with_tied_copies=True)
    kind = catalog.title.partition(", ")[2]
    if isinstance(model, MegatronModel) and isinstance(catalog, MegatronCatalog):
        check_elements(catalog, list(catalog.tensors)[world.rank :: world.size])
        kind = f"Megatron {catalog.grid}" if isinstance(catalog, TorchCatalog) else f"Megatron {model.format}"
        kind += "" if model.iteration is None else f", iteration {model.iteration}"
    return Checkpoint(model.directory, kind, model.vocab is not None, catalog, model.found.visible)


def _with_copies(checkpoint: Checkpoint, listings: Sequence[Listing]) -> Checkpoint:
    """The checkpoint with a name of its own for each different file of one name."""
    known: dict[str, dict[tuple[int, ...], str]] = {}
    for file, found in ((file, found) for listing in listings for file, found in listing.items()):
        alike = known.setdefault(file, {})
        alike.setdefault(tuple(found), name_at(len(alike), file))
    if all(len(alike) == 1 for alike in known.values()):
        return checkpoint
    visible = tuple(frozenset(known[file][tuple(found)] for file, found in listing.items()) for listing in listings)
    return replace(checkpoint, visible=visible, copies={file: tuple(alike.values()) for file, alike in known.items()})


def compare_all(a: Checkpoint, b: Checkpoint, work: Work, world: World, channel: Control) -> Outcome:
    """Compare this rank's blocks and put together what all ranks found; every rank gets the same outcome.

    Raises:
        SourceError: a file that ends early, or cannot be read.
        PlanError: ranks disagree about the work, or not all of it was done.
    """
    agree(world, work.digest)
    mine = (block for rank, block in deal(a, b, work.sample) if rank == world.rank)

    def on_compared(size_bytes: int) -> None:
        channel.add_progress(size_bytes)
        channel.doing("comparing")

    with channel.progress(work.size_bytes, "comparing"):
        found = compare(a, b, mine, on_compared)
        channel.doing("waiting for other ranks to compare")
        listed = gather_objects(world, (asdict(found.amount), [*map(asdict, found.differences.values())]))
    total = Compared()
    for amount, differing in listed:
        total.amount += Amount(**amount)
        for one in differing:
            pairs = {name: tuple(one[name]) for name in ("index", "values", "files")}
            total.add(Difference(**{**one, **pairs}))
    if total.amount != work.amount:
        raise PlanError("not everything was compared", expected=work.amount, found=total.amount)
    return outcome_of(a, b, work, total)


#: Differences that an error names.
_SHOWN = 8


def prepare_check(job: Options, task: Task, world: World) -> Model | None:
    """A conversion's source, its headers read anew, to compare the target with; None where that was not asked for.

    Raises:
        BudgetTooSmall, UsageError: the comparison could not be made.
    """
    if job.verify is None:
        return None
    check_budget(job.max_memory_per_rank_bytes)
    _check_sights(task)
    asked, like = replace(job, ckpt_dir_name=None), read_like(job.like, world)
    where = Where(task.source.directory, asked, like, is_compared=not job.accept_differing_copies)
    return _open("source", where, world)


def compare_with_source(source: Model, task: Task, directory: Path, world: World, channel: Control) -> str:
    """Compare what lies in a directory with what it was made from, on every rank; says what was compared.

    Raises:
        DifferentModel: they are not the same model.
        SourceError: a file cannot be read, or is damaged.
    """
    channel.doing("reading the target's headers")
    family = task.content.ends.source.architecture.family
    target = _open("target", Where(directory, family=family, is_compared=True), world)
    a, b = _checkpoints(source, target, world)
    work = work_of(a, b, SAMPLE if task.job.verify == "sample" else Fraction(1))
    outcome = compare_all(a, b, work, world, channel)
    if not outcome.is_same:
        raise _different(task, directory, outcome)
    share = "" if outcome.sample == 1 else f" (a sample: {describe_sample(outcome)})"
    return (
        f"{shown_line(task.target)}: verified, {sum(outcome.tensors.values())} tensors with "
        f"{outcome.amount.elements:,} elements and {outcome.fields} config fields equal the source{share}"
    )


def _check_sights(task: Task) -> None:
    """Refuse a target of which no node has all while it lacks some of the source: parts cannot be compared."""
    if not task.is_divided:
        return
    for disk in sorted(set(task.disks)):
        ranks = [rank for rank, of_rank in enumerate(task.disks) if of_rank == disk]
        best = max((task.source.found.visible[rank] for rank in ranks), key=len)
        missing = sorted(task.source.found.identity.keys() - best)
        if missing and task.writable[ranks[0]]:
            raise UsageError(
                "--verify cannot compare files on the disks of different nodes",
                missing[0],
                expected="with --save-per-node, every node sees the whole source",
                found=f"rank {ranks[0]} does not see this file",
                remedy="leave out --verify, copy the nodes' directories into one that all nodes see, and compare then: "
                "torchrun ... -m dist_convert verify SOURCE DIRECTORY",
            )


def _different(task: Task, directory: Path, outcome: Outcome) -> DifferentModel:
    found = differences(outcome)
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    remedy = f"{task.partial.name} is kept under this name, to be looked at: convert again"
    what = "the model that was written (B) is not the one that was read (A)"
    if directory == task.target:
        remedy = "the target or the source may have changed since the conversion: convert again to another target"
    if len(found) == sum(one.between == "two copies in A" for one in outcome.values):
        what = "copies of one tensor in the source (A) differ, which samples did not show before"
        remedy = (
            "copy the source again from where it was saved, or convert with --accept-differing-copies, which takes "
        )
        remedy += "those of the lowest rank; choose another target"
    return DifferentModel(
        what,
        directory,
        expected="equal tensors and config fields",
        found=counted(len(found), "difference"),
        remedy=f"{remedy}; report it if it happens again",
        lines=[*found[:_SHOWN], *more],
    )
