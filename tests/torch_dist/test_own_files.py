"""On the nodes' own disks each rank sees the `.distcp` files that its node wrote, and one of them `.metadata`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import Grid, Model
from tests.converting import assert_same, read_tensors
from tests.distributed.launching import flags, run_jobs
from tests.distributed_checkpoints import make_distributed

ITERATION = "iter_0000004"
MIXTRAL = Model(experts=4, groups=4)
BESIDE = (".metadata", "common.pt", "metadata.json")

#: Case -> model, saving grid, and for each rank the numbers of the files it is given.
CASES: dict[str, tuple[Model, Grid, list[list[int]]]] = {
    "a file a rank": (Model(), Grid(tp=2, pp=2), [[0], [1], [2], [3]]),
    "a stage a rank": (Model(), Grid(tp=2, pp=2), [[0, 1], [2, 3], [], []]),
    "two files a rank that share nothing": (Model(), Grid(tp=2, pp=2), [[3, 0], [1, 2], [0], [3]]),
    "experts": (MIXTRAL, Grid(tp=2, ep=2), [[0], [1], [2], [3]]),
    "another metadata on one disk": (Model(), Grid(tp=2, pp=2), [[0], [1], [2], [3]]),
    "a file that nobody has": (Model(), Grid(tp=2, pp=2), [[0], [1], [2], [2]]),
}


def hand_out(checkpoint: Path, places: Sequence[Sequence[int]], root: Path) -> None:
    """Give each rank the directory `root/N/iter_0000004` with its files; the last one gets `.metadata`, too."""
    for number, given in enumerate(places):
        directory = root / f"{number}" / ITERATION
        directory.mkdir(parents=True)
        names = [f"__{file}_0.distcp" for file in given] + [*BESIDE] * (number == len(places) - 1)
        for name in names:
            os.link(checkpoint / ITERATION / name, directory / name)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Case -> outcome, expected tensors and target."""
    root, jobs, expected = tmp_path_factory.mktemp("own-files"), {}, {}
    for case, (model, grid, places) in CASES.items():
        expected[case] = make_distributed(root / case / "whole", model, grid)
        hand_out(root / case / "whole", places, root / case / "rank")
        if case == "another metadata on one disk":
            other = (root / case / "whole" / ITERATION / ".metadata").read_bytes().replace(b"__3_0", b"__0_0")
            (root / case / "rank/1" / ITERATION / ".metadata").write_bytes(other)
        how = ("--ckpt-dir-name", ITERATION, "--max-memory-per-rank", "76MB")
        jobs[case] = flags(f"{root / case}/rank/{{rank}}", root / case / "hf", *how)
    answers = run_jobs(4, jobs, root)
    return {case: (answers[case], expected[case], root / case / "hf") for case in jobs}


@pytest.mark.parametrize("case", list(CASES)[:-2])
def test_ranks_with_nothing_but_their_own_files_convert_the_whole(case: str, outcomes: dict[str, Any]) -> None:
    answer, expected, target = outcomes[case]
    assert answer.exit_codes == [0] * 4, answer.stderr
    assert_same(read_tensors(target), expected)
    assert answer.outcome["read_bytes"] == sum(tensor.nbytes for tensor in expected.values())


def test_a_file_that_no_rank_sees_is_named(outcomes: dict[str, Any]) -> None:
    answer, _, target = outcomes["a file that nobody has"]
    assert set(answer.exit_codes) == {1}
    assert "1 missing: __3_0.distcp" in "".join(answer.stderr)
    assert not target.exists()


def test_nodes_with_different_metadata_are_named(outcomes: dict[str, Any]) -> None:
    answer, _, target = outcomes["another metadata on one disk"]
    assert set(answer.exit_codes) == {1}
    assert "two ranks see different files under one name" in "".join(answer.stderr)
    assert f"{ITERATION}/.metadata" in "".join(answer.stderr)
    assert "bytes as on rank 1" in "".join(answer.stderr)
    assert "bytes of other content on rank 3" in "".join(answer.stderr)
    assert not target.exists()
