"""Plans a full-size model for many ranks and prints what came of it as JSON.

    python -m tests.plan.scale MODEL PLACEMENT WORLD [RANKS]

A process of its own, so that it can be asked what it has imported. With `gather` each rank sees one shard. RANKS
limits the ranks whose steps are derived to so many of the first group.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from typing import Any

from dist_convert.plan.plan import divide, schedule_digest
from dist_convert.plan.steps import steps_of
from tests.plan.headers import FULL_SIZE, Interval, cover_faults, plan_to_huggingface, shards, written_intervals


def planned(name: str, placement: str, world: int, most_ranks: int | None = None) -> dict[str, Any]:
    """CPU seconds of a rank's whole plan and of its own steps, what each rank writes, and what is wrong with it."""
    model, grid, layers = FULL_SIZE[name]
    headers = shards(model, grid, layers)
    files = sorted(headers)
    everything = frozenset(files)
    visible = [everything if placement == "direct" else frozenset([files[r % len(files)]]) for r in range(world)]

    started = time.process_time()
    content = plan_to_huggingface(headers, model)
    plan = divide(content, visible, placement=placement, budget_bytes=1_000_000_000)
    schedule_digest(plan)
    plan_seconds = time.process_time() - started

    ranks = range(world) if most_ranks is None else plan.groups[0].ranks[:most_ranks]
    written_bytes, gathers, steps_seconds = [], set(), 0.0
    intervals: list[Interval] = []
    for rank in ranks:
        started = time.process_time()
        steps = list(steps_of(plan, rank))
        steps_seconds = max(steps_seconds, time.process_time() - started)
        group, member = plan.group_of(rank)
        written = list(written_intervals(steps, member))
        written_bytes.append(sum(end - start for _, start, end in written))
        intervals += written
        gathers.add((group, hash(tuple(step for step in steps if step.send_bytes))))
    return {
        "plan_seconds": round(plan_seconds, 3),
        "steps_seconds": round(steps_seconds, 3),
        "groups": len(plan.groups),
        "groups_seen": len({plan.group_of(rank)[0] for rank in ranks}),
        "different_gathers": len(gathers),
        "target_bytes": sum(tensor.size_bytes for file in content.files for tensor in file.tensors),
        "written_bytes": written_bytes,
        "overlaps": sum(a[0] == b[0] and a[2] > b[1] for a, b in pairwise(sorted(intervals))),
        "faults": cover_faults(content, intervals)[:3] if most_ranks is None else None,
        "heavy_imports": sorted({"torch", "numpy", "transformers", "megatron"} & sys.modules.keys()),
    }


if __name__ == "__main__":
    print(json.dumps(planned(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))))
