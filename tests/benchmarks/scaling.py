"""Shows how work divides over many ranks, from plans alone: `python tests/benchmarks/scaling.py`.

Llama-3.1-405B, Mixtral-8x22B and DeepSeek-V3 are planned from every format to every other, from sparse files of their
full size: to Megatron's formats at another grid than that of a source in one of them. Each with ranks that

* `direct`: work alone, and see every file;
* `gather`: see every file and gather, where something crosses: the default on accelerators;
* `own`: have shards of `torch` on their nodes' own disks, one each, or several where there are fewer ranks than shards.

Bytes and numbers are of the rank that has most. What a rank receives over gloo is what it writes and others have read.
An accelerator's all-gather brings it all that its group gathers. `calls` are reads and writes, a window with gaps
counts once, and `MB` is their mean. `files` are opened for data; besides, all ranks together open each source file once
for its header, and each target file is made, given its size, synced and, with its directory, renamed once. `memory` is
what planning takes of it at most, `plan` its seconds of one core, from the first header to the rank's own steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dist_convert.__main__ import importing
from dist_convert.plan.content import Content
from dist_convert.plan.plan import Plan, divide, schedule_digest
from dist_convert.plan.steps import blocks_alone, blocks_of_group, messages, steps_of
from tests.published import make_published, make_published_megatron, task_of

FORMATS = ("torch", "torch_dist", "huggingface")
PLACEMENTS = ("direct", "gather", "own")


#: DeepSeek-V3 without its layer of multi-token prediction, which some sizes of pipelines have no place for.
NO_PREDICTION = {"num_nextn_predict_layers": 0}


@dataclass(frozen=True)
class Model:
    """A published model: its number of weights files, the grid of its Megatron checkpoints, and another one."""

    files: int
    grid: str
    other: str


MODELS = {
    "llama-3.1-405b": Model(
        191,
        "--tp 8 --pp 16 --decoder-first-pipeline-num-layers 7 --decoder-last-pipeline-num-layers 7",
        "--tp 4 --pp 9",
    ),
    "mixtral-8x22b": Model(59, "--tp 2 --pp 4 --ep 8", "--tp 4 --pp 2 --ep 4"),
    "deepseek-v3": Model(
        163,
        "--tp 8 --pp 8 --ep 8 --etp 1 --decoder-first-pipeline-num-layers 8 --decoder-last-pipeline-num-layers 5",
        "--tp 4 --pp 1 --ep 32 --etp 1",
    ),
}


@dataclass(frozen=True)
class Load:
    """What a plan gives to each rank, in bytes.

    Attributes:
        read, written: of files, by rank.
        received: from others over gloo, by rank.
        gathered: by an accelerator's all-gathers, by rank.
        buffers: the most that those could bring: the group's buffer for every gather, by rank.
        calls: reads and writes, by rank; a window with gaps counts once.
        files: that are opened, by rank.
        groups: groups of ranks.
    """

    read: tuple[int, ...]
    written: tuple[int, ...]
    received: tuple[int, ...]
    gathered: tuple[int, ...]
    buffers: tuple[int, ...]
    calls: tuple[int, ...]
    files: tuple[int, ...]
    groups: int

    @property
    def filled(self) -> float:
        """The largest part that a rank uses of the buffers of its gathers; 0 where nothing is gathered."""
        return max((used / whole for used, whole in zip(self.gathered, self.buffers, strict=True) if whole), default=0)


def ratio(of_ranks: Sequence[int]) -> float:
    """The largest over the mean."""
    return max(of_ranks) * len(of_ranks) / sum(of_ranks)


def make_source(root: Path, name: str, form: str) -> Path:
    """The sparse files of a model in one format; what an earlier call has made stays."""
    path = root / f"{name}-{form}"
    if path.exists():
        return path
    if form == "huggingface":
        make_published(path, name, MODELS[name].files, **NO_PREDICTION)
    else:
        source = make_source(root, name, "huggingface")
        make_published_megatron(["convert", str(source), str(path), "--to", form, *MODELS[name].grid.split()])
    return path


def planned(source: Path, name: str, to: str) -> Content:
    """What is converted, worked out from the headers."""
    to_another = not source.name.endswith("huggingface")
    grid = (MODELS[name].other if to_another else MODELS[name].grid) if to != "huggingface" else ""
    return task_of(["convert", str(source), str(source.parent / "target"), "--to", to, *grid.split()]).content


def visible(content: Content, placement: str, ranks: int) -> list[frozenset[str]]:
    """The source files that each rank sees."""
    files = sorted({file for one in content.transfers for files in one.source_files for file in files})
    if placement != "own":
        return [frozenset(files)] * ranks
    return [frozenset(files[rank % len(files) :: ranks]) for rank in range(ranks)]


def load(content: Content, placement: str, ranks: int) -> Load:
    """Divide a content over ranks, and add up what each of them does."""
    plan = plan_for(content, placement, ranks)
    by_rank = dict(pair for number in range(len(plan.groups)) for pair in _group_load(plan, number))
    read, written, received, gathered, buffers, calls, files = zip(*(by_rank[n] for n in range(ranks)), strict=True)
    return Load(read, written, received, gathered, buffers, calls, files, len(plan.groups))


def plan_for(content: Content, placement: str, ranks: int) -> Plan:
    """What a rank works out: the plan, its digest and the steps of rank 0."""
    kind = "direct" if placement == "direct" else "gather"
    plan = divide(content, visible(content, placement, ranks), placement=kind, budget_bytes=1_000_000_000)
    schedule_digest(plan)
    for _ in steps_of(plan, 0):
        pass
    return plan


def _group_load(plan: Plan, number: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """For each rank of a group, the numbers of `Load`."""
    group = plan.groups[number]
    members = len(group.ranks)
    read, written, received, calls = ([0] * members for _ in range(4))
    files: list[set[str]] = [set() for _ in range(members)]
    alone = (block for member in range(members) for block in blocks_alone(plan, number, member))
    for block in chain(blocks_of_group(plan, number), alone):
        for one in block.reads:
            read[one.reader] += one.source.size_bytes
            calls[one.reader] += 1
            files[one.reader].add(one.source.file)
        for write in block.writes:
            written[write.writer] += write.target.size_bytes
            calls[write.writer] += 1
            files[write.writer].add(write.target.file)
    gathers = [step for step in steps_of(plan, group.ranks[0]) if step.send_bytes] if members > 1 else []
    for message in (message for step in gathers for message in messages(step)):
        received[message.receiver] += message.size_bytes
    gathered = sum(step.send_bytes for step in gathers) * members
    buffers = len(gathers) * plan.limits[number].received_bytes
    for member, rank in enumerate(group.ranks):
        moved = (read[member], written[member], received[member], gathered, buffers)
        yield rank, (*moved, calls[member], len(files[member]))


def show(source: Path, name: str, to: str, placements: Sequence[str], of_ranks: Sequence[int]) -> None:
    """Print the lines of a pair of formats."""
    started = time.process_time()
    content = planned(source, name, to)
    content_seconds = time.process_time() - started
    for placement, ranks in product(placements, of_ranks):
        if placement == "own" and not source.name.endswith("torch"):
            continue
        started = time.process_time()
        plan_for(content, placement, ranks)
        seconds = content_seconds + time.process_time() - started
        found = load(content, placement, ranks)
        if placement == "direct" or any(found.gathered):
            print(row(placement, ranks, found, seconds), flush=True)


def memory_bytes(source: Path, name: str, to: str) -> int:
    """The most that planning for 1,024 ranks holds at once, as `tracemalloc` counts it."""
    tracemalloc.start()
    plan_for(planned(source, name, to), "direct", 1024)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak_bytes


def main() -> None:
    """Print a table for each model and pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)")
    parser.add_argument("--source", nargs="+", choices=FORMATS, default=FORMATS, help="(default: all)")
    parser.add_argument("--to", nargs="+", choices=FORMATS, default=FORMATS, help="(default: all)")
    parser.add_argument("--placement", nargs="+", choices=PLACEMENTS, default=PLACEMENTS, help="(default: all)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 1024], help="(default: 8 64 1024)")
    given = parser.parse_args()
    with importing():  # so that the search for garbage is as rare as in the command
        pass
    with tempfile.TemporaryDirectory(prefix="scaling-") as root:
        for name, form, to in product(given.model, given.source, given.to):
            source = make_source(Path(root), name, form)
            print(f"{name}, {form} to {to}, memory {memory_bytes(source, name, to) / 1e6:.0f} MB\n\n{HEADING}")
            show(source, name, to, given.placement, given.ranks)
            print()


HEADING = (
    "way     ranks groups   read GB        written GB     gloo GB  all-gather  filled    calls     MB  files  plan s"
)


def row(placement: str, ranks: int, found: Load, plan_seconds: float) -> str:
    """A line of the table."""
    moved = "".join(f"{max(of) / 1e9:8.2f} {ratio(of):5.3f}x" for of in (found.read, found.written))
    others = f"{max(found.received) / 1e9:8.2f}  {max(found.gathered) / 1e9:10.2f}  {found.filled:6.2f}"
    busiest = found.calls.index(max(found.calls))
    call_mb = (found.read[busiest] + found.written[busiest]) / found.calls[busiest] / 1e6
    others += f"  {found.calls[busiest]:7}  {call_mb:5.2f}  {max(found.files):5}"
    return f"{placement:7} {ranks:5} {found.groups:6} {moved}  {others}  {plan_seconds:6.2f}"


if __name__ == "__main__":
    main()
