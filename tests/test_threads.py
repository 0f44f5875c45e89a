"""How many threads a rank's torch has: its share of the cores that it may run on, which taskset or Docker limits."""

from __future__ import annotations

import os

import pytest

from tests.warm import Process

#: Of a machine with 64 cores, so that whoever counts those of the machine is told from who counts its own.
COUNT = """
import os, sys, torch
from dist_convert.ranks.device import limit_threads
os.cpu_count = lambda: 64
may, ranks = int(sys.argv[1]), int(sys.argv[2])
if may == 1:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
else:
    os.sched_getaffinity = lambda process: set(range(may))
limit_threads(ranks, 4)
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(
    ("cores", "ranks", "environment", "threads"),
    [(1, 1, None, 1), (16, 1, None, 4), (16, 2, None, 2), (16, 8, None, 1), (16, 1, "1", 4)],
)
def test_threads_are_those_of_a_rank_s_share_of_the_cores_that_it_may_run_on_for_each_of_four_workers(
    cores: int, ranks: int, environment: str | None, threads: int
) -> None:
    found = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    found |= {} if environment is None else {"OMP_NUM_THREADS": environment}
    run = Process(["-c", COUNT, str(cores), str(ranks)], found).finish()
    assert (run.stdout, run.returncode) == (f"{threads}\n", 0), run.stderr
