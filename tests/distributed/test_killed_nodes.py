"""Ranks with disks of their own are killed at random moments: every node ends with the bytes that are its own.

`DIST_CONVERT_KILLS` says how often, for each case.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model
from tests.distributed.interrupting import Runs, hashes_below
from tests.distributed.small_sources import LLAMA, MIXTRAL
from tests.to_megatron import FILE, TRACKER, grid_flags, make_hf, to_megatron

KILLS = int(os.environ.get("DIST_CONVERT_KILLS", "4"))
ITERATION = "iter_0000001"

#: Model, grid, training processes a node, and what each of two nodes gets.
CASES: dict[str, tuple[Model, Grid, int, list[list[str]]]] = {
    "a tensor rank a node": (LLAMA, Grid(tp=2), 1, [["mp_rank_00"], ["mp_rank_01"]]),
    "experts of both nodes": (
        MIXTRAL, Grid(tp=2, ep=2), 2, [["mp_rank_00_000", "mp_rank_01_000"], ["mp_rank_00_001", "mp_rank_01_001"]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_nodes_that_are_killed_again_and_again_end_with_the_bytes_of_their_own_directories(
    name: str, runs: Runs, tmp_path: Path
) -> None:
    model, grid, processes, expected = CASES[name]
    chance, target = random.Random(name), tmp_path / "target"
    make_hf(tmp_path / "hf", model)
    assert to_megatron(tmp_path / "hf", tmp_path / "whole", "--make-vocab-size-divisible-by", "128", grid=grid) == 0
    words = ["hf-to-megatron", "--load-dir", str(tmp_path / "hf"), "--save-dir", str(target / "node{node}"), "--device"]
    words += ["cpu", *grid_flags(grid), "--target-ranks-per-node", str(processes)]
    undisturbed = runs.do(words, ranks=2, nodes=2)
    assert undisturbed.exit_codes == [0, 0], undisturbed.printed
    for node, names in enumerate(expected):
        assert sorted(path.name for path in (target / f"node{node}" / ITERATION).glob("mp_rank*")) == names
        for directory in names:
            whole = tmp_path / "whole" / ITERATION / directory / FILE
            assert (target / f"node{node}" / ITERATION / directory / FILE).read_bytes() == whole.read_bytes()
    hashes = hashes_below(target)
    shutil.rmtree(target)
    kills = ended = 0
    while kills < KILLS or not ended:
        ranks, is_last = chance.choice([2, 2, 4]), kills >= KILLS
        rank = chance.randrange(ranks)
        moment = 0 if is_last else chance.randrange(1, undisturbed.calls[0] * 5 // 4 * 2 // ranks)
        run = runs.do(
            words, ranks=ranks, nodes=2, rank=rank, moment=moment, signals=["SIGKILL"],
            all=rank == 0 or chance.random() < 0.3,
        )  # fmt: skip
        assert run.seconds < 50, run.printed  # else it hung
        if -9 in run.exit_codes:
            kills += 1
            assert set(run.exit_codes) <= {-9, 0, 1, 143}, run.printed
            for tracker in target.glob(f"node*/{TRACKER}"):  # no node speaks of a target that another lacks
                assert tracker.read_text().strip() == "1"
                assert len(list(target.glob(f"node*/{ITERATION}"))) == len(expected)
            continue
        assert set(run.exit_codes) == {0}, (run, sorted(target.rglob("*")))
        assert hashes_below(target) == hashes
        shutil.rmtree(target)
        ended += 1
