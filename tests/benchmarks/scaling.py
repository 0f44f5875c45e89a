"""Shows how work divides over many ranks, from plans alone: `python tests/benchmarks/scaling.py`.

Llama-3.1-405B and Mixtral-8x22B are planned in both directions, from headers that are made up, for

* `direct`: every rank sees every file;
* `gather all`: the same, and ranks gather: the default on accelerators where nodes share a file system;
* `gather own`: shards on the nodes' own disks; each rank sees one, or several where there are fewer ranks than shards.
  A Hugging Face source is on a file system that all share.

Reads, writes and receives are of the largest rank, with their ratio to the mean (targets: at most 1.1). What a rank
receives over gloo is what it writes and others have read. An accelerator's all-gather brings it all that its team
gathers; that is at most the team's buffer (`members` x what each sends) for every gather: `filled` is the part of that
which is used. `MB a call` is the mean of the reads and writes of the rank that has most of them, `files` the most that
one rank opens. `plan s` is what one rank takes from the headers to its own steps, on one core (target: 5 s for 405B).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dist_convert.plan.content import Content
from dist_convert.plan.plan import Plan, divide, schedule_digest
from dist_convert.plan.steps import blocks_alone, blocks_of_team, messages, steps_of
from tests.plan.headers import FULL_SIZE, plan_to_huggingface, plan_to_megatron, shards

MODELS = ("Llama-3.1-405B TP8 PP16", "Mixtral-8x22B TP2 PP4 EP8")
DIRECTIONS = ("megatron-to-hf", "hf-to-megatron")
PLACEMENTS = ("direct", "gather all", "gather own")
MOST_RATIO, MOST_SECONDS = 1.1, 5.0


@dataclass(frozen=True)
class Load:
    """What a plan gives to each rank, in bytes.

    Attributes:
        read, written: of files, by rank.
        received: from others over gloo, by rank.
        gathered: by an accelerator's all-gathers, by rank.
        buffers: the most that those could bring: the team's buffer for every gather, by rank.
        calls: reads and writes, by rank; a window with gaps counts once.
        files: that are opened, by rank.
        teams: groups of ranks.
        plan_seconds: of one rank.
    """

    read: tuple[int, ...]
    written: tuple[int, ...]
    received: tuple[int, ...]
    gathered: tuple[int, ...]
    buffers: tuple[int, ...]
    calls: tuple[int, ...]
    files: tuple[int, ...]
    teams: int
    plan_seconds: float

    @property
    def filled(self) -> float:
        """The largest part that a rank uses of the buffers of its gathers; 0 where nothing is gathered."""
        return max((used / whole for used, whole in zip(self.gathered, self.buffers, strict=True) if whole), default=0)

    @property
    def is_within_targets(self) -> bool:
        """Whether work is even and planned in time."""
        even = ratio(self.read) <= MOST_RATIO and ratio(self.written) <= MOST_RATIO
        return even and self.filled <= 1 and self.plan_seconds <= MOST_SECONDS


def ratio(of_ranks: Sequence[int]) -> float:
    """The largest over the mean."""
    return max(of_ranks) * len(of_ranks) / sum(of_ranks)


def planned(name: str, direction: str) -> tuple[Content, float]:
    """What is converted, and the seconds that it takes to work that out from the headers."""
    model, grid, layers = FULL_SIZE[name]
    headers = shards(model, grid, layers)
    started = time.process_time()
    content = plan_to_huggingface(headers, model)
    if direction == "hf-to-megatron":
        started = time.process_time()
        content = plan_to_megatron(content, headers, model)
    return content, time.process_time() - started


def visible(content: Content, placement: str, ranks: int) -> list[frozenset[str]]:
    """The source files that each rank sees."""
    files = sorted({file for one in content.transfers for files in one.source_files for file in files})
    if placement != "gather own" or content.ends.target.is_owned:
        return [frozenset(files)] * ranks
    return [frozenset(files[rank % len(files) :: ranks]) for rank in range(ranks)]


def load(content: Content, placement: str, ranks: int, content_seconds: float = 0.0) -> Load:
    """Divide a content over ranks, and add up what each of them does."""
    seen = visible(content, placement, ranks)
    started = time.process_time()
    plan = divide(content, seen, placement=placement.split()[0], budget_bytes=1_000_000_000)
    schedule_digest(plan)
    for _ in steps_of(plan, 0):
        pass
    plan_seconds = content_seconds + time.process_time() - started
    by_rank = dict(pair for number in range(len(plan.teams)) for pair in _team_load(plan, number))
    of_ranks = zip(*(by_rank[rank] for rank in range(ranks)), strict=True)
    return Load(*of_ranks, teams=len(plan.teams), plan_seconds=plan_seconds)


def _team_load(plan: Plan, number: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """For each rank of a team, the bytes of `Load` from `read` to `files`."""
    team = plan.teams[number]
    members = len(team.ranks)
    read, written, received, calls = ([0] * members for _ in range(4))
    files: list[set[str]] = [set() for _ in range(members)]
    alone = (block for member in range(members) for block in blocks_alone(plan, number, member))
    for block in chain(blocks_of_team(plan, number), alone):
        for one in block.reads:
            read[one.reader] += one.source.size_bytes
            calls[one.reader] += 1
            files[one.reader].add(one.source.file)
        for write in block.writes:
            written[write.writer] += write.target.size_bytes
            calls[write.writer] += 1
            files[write.writer].add(write.target.file)
    gathers = [step for step in steps_of(plan, team.ranks[0]) if step.send_bytes] if members > 1 else []
    for message in (message for step in gathers for message in messages(step)):
        received[message.receiver] += message.size_bytes
    gathered = sum(step.send_bytes for step in gathers) * members
    buffers = len(gathers) * plan.limits[number].received_bytes
    for member, rank in enumerate(team.ranks):
        moved = (read[member], written[member], received[member], gathered, buffers)
        yield rank, (*moved, calls[member], len(files[member]))


def main() -> int:
    """Print the table; 1 if work is uneven, or planned too slowly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=sorted(FULL_SIZE), default=MODELS, help="(default: two)")
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=DIRECTIONS, help="(default: both)")
    parser.add_argument("--placement", nargs="+", choices=PLACEMENTS, default=PLACEMENTS, help="(default: all)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 256, 1024], help="(default: 8 64 256 1024)")
    given = parser.parse_args()
    is_met = True
    for name in given.model:
        for direction in given.direction:
            content, seconds = planned(name, direction)
            print(f"{name}, {direction}: GB of the largest rank, ratio to the mean\n")
            print(
                "placement   ranks  teams          reads         writes  receives: gloo  all-gather  filled  "
                "MB a call  files  plan s"
            )
            for placement in given.placement:
                if placement != "direct" and direction == "hf-to-megatron":
                    continue  # nothing crosses: the same as `direct`
                for ranks in given.ranks:
                    found = load(content, placement, ranks, seconds)
                    is_met &= found.is_within_targets
                    print(row(placement, ranks, found), flush=True)
            print()
    return 0 if is_met else 1


def row(placement: str, ranks: int, found: Load) -> str:
    """A line of the table."""
    files = "".join(f"{max(of) / 1e9:8.2f} {ratio(of):5.3f}x" for of in (found.read, found.written))
    others = f"{max(found.received) / 1e9:14.2f}  {max(found.gathered) / 1e9:10.2f}  {found.filled:6.2f}"
    busiest = found.calls.index(max(found.calls))
    call_mb = (found.read[busiest] + found.written[busiest]) / found.calls[busiest] / 1e6
    others += f"  {call_mb:9.2f}  {max(found.files):5}"
    missed = "" if found.is_within_targets else "  MISSED"
    return f"{placement:11} {ranks:5} {found.teams:6}{files}  {others}  {found.plan_seconds:6.2f}{missed}"


if __name__ == "__main__":
    sys.exit(main())
