"""In gather placement a rank needs only its own shards: each rank is given a directory that holds no others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import Grid, Model, make
from tests.converting import assert_same, convert, read_tensors
from tests.distributed.launching import flags, run_jobs

ITERATION = "iter_0000004"
MIXTRAL = Model(experts=4, groups=4)
#: Weights of 2 MB and more, so that several steps are gathered within the smallest budget.
LARGE = Model(hidden=512, ffn=4096, heads=8, groups=4, head_dim=64, layers=2)

#: Case -> model, grid, and for each rank the numbers of the rank directories (in the order of their names) it is given.
Case = tuple[Model, Grid, list[list[int]]]
CASES: dict[str, Case] = {
    # mp_rank_00_000, mp_rank_00_001, mp_rank_01_000, mp_rank_01_001: tensor rank, then stage
    "a shard a rank": (Model(), Grid(tp=2, pp=2), [[0], [1], [2], [3]]),
    "a shard a rank, large": (LARGE, Grid(tp=2, pp=2), [[0], [1], [2], [3]]),
    "a shard a rank, permuted": (Model(), Grid(tp=2, pp=2), [[2], [0], [3], [1]]),
    "a shard a rank, reversed": (Model(), Grid(tp=2, pp=2), [[3], [2], [1], [0]]),
    "a stage a rank": (Model(), Grid(tp=2, pp=2), [[0, 2], [1, 3]]),
    "a tensor rank a rank": (Model(), Grid(tp=2, pp=2), [[0, 1], [2, 3]]),
    "two shards a rank that share nothing": (Model(), Grid(tp=2, pp=2), [[0, 3], [1, 2]]),
    "two shards a rank that share nothing, large": (LARGE, Grid(tp=2, pp=2), [[0, 3], [1, 2]]),
    "one shard or two a rank": (Model(), Grid(tp=2, pp=2), [[0], [1, 2], [3]]),
    "shards on several ranks": (Model(), Grid(tp=2, pp=2), [[0, 1, 2, 3], [1], [1, 2], [3]]),
    "two ranks on each of two nodes": (Model(), Grid(tp=2, pp=2), [[0, 1], [0, 1], [2, 3], [2, 3]]),
    "virtual stages": (Model(), Grid(tp=2, pp=2, vpp=2), [[3], [1], [0], [2]]),
    "all on the last rank": (Model(), Grid(tp=2, pp=2), [[], [], [], [0, 1, 2, 3]]),
    "a rank without shards, last": (Model(), Grid(tp=2), [[0], [1], []]),
    "a rank without shards, first": (Model(), Grid(tp=2), [[], [1], [0]]),
    "as many ranks without shards as with": (Model(), Grid(tp=2), [[0], [], [], [1]]),
    "tensor ranks of four": (Model(groups=4), Grid(tp=4), [[1], [3], [0], [2]]),
    "tensor ranks of four, two a rank": (Model(groups=4), Grid(tp=4), [[1, 3], [0, 2]]),
    "tensor ranks of four, large": (LARGE, Grid(tp=4), [[1], [3], [0], [2]]),
    "tied embeddings at both ends": (Model(tied=True), Grid(tp=2, pp=2), [[1], [0], [3], [2]]),
    # mp_rank_00_000, mp_rank_00_001, mp_rank_01_000, mp_rank_01_001: tensor rank, then expert rank
    "experts": (MIXTRAL, Grid(tp=2, ep=2), [[0], [1], [2], [3]]),
    "experts, permuted": (MIXTRAL, Grid(tp=2, ep=2), [[3], [0], [2], [1]]),
    "experts, an expert rank a rank": (MIXTRAL, Grid(tp=2, ep=2), [[0, 2], [1, 3]]),
    "experts, a tensor rank a rank": (MIXTRAL, Grid(tp=2, ep=2), [[0, 1], [2, 3]]),
    "experts, two shards a rank that share nothing": (MIXTRAL, Grid(tp=2, ep=2), [[1, 2], [0, 3]]),
    "experts that are not cut": (MIXTRAL, Grid(tp=2, ep=2, etp=1), [[1], [0]]),
    "experts of stages": (MIXTRAL, Grid(tp=2, pp=2, ep=2), [[0, 5], [1, 4], [2, 7], [3, 6]]),
    "auto placement": (Model(), Grid(tp=2), [[1], [0]]),
    "auto placement, straight at the shards": (Model(), Grid(tp=2), [[1], [0]]),
    "direct placement of whole stages": (Model(), Grid(tp=2, pp=2), [[1, 3], [0, 2]]),
}  # fmt: skip

#: Of cases that differ from the others: the load path in a rank's directory, and flags.
HOW = {
    "auto placement": ("", ("--ckpt-dir-name", ITERATION)),
    "auto placement, straight at the shards": (f"/{ITERATION}", ()),
    "direct placement of whole stages": ("", ("--ckpt-dir-name", ITERATION, "--placement", "direct")),
}
BY_GATHER = ("", ("--ckpt-dir-name", ITERATION, "--placement", "gather", "--max-memory-per-rank", "76MB"))


def hand_out(checkpoint: Path, places: Sequence[Sequence[int]], root: Path) -> None:
    """Give each rank the directory `root/N/iter_0000004` with its shards and nothing else; files are not copied."""
    shards = sorted((checkpoint / ITERATION).iterdir())
    for number, given in enumerate(places):
        (root / f"{number}" / ITERATION).mkdir(parents=True)
        for shard in (shards[place] for place in given):
            (root / f"{number}" / ITERATION / shard.name).mkdir()
            os.link(shard / "model_optim_rng.pt", root / f"{number}" / ITERATION / shard.name / "model_optim_rng.pt")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case converted, case -> outcome, expected and found tensors."""
    found = {}
    for ranks in (2, 3, 4):
        jobs, expected = {}, {}
        root = tmp_path_factory.mktemp(f"{ranks}-ranks")
        for case, (model, grid, places) in CASES.items():
            if len(places) == ranks:
                expected[case] = make(root / case / "whole", model, grid)
                hand_out(root / case / "whole", places, root / case / "rank")
                below, how = HOW.get(case, BY_GATHER)
                jobs[case] = flags(f"{root / case}/rank/{{rank}}{below}", root / case / "hf", *how)
        answers = run_jobs(ranks, jobs, root)
        found |= {case: (answers[case], expected[case], root / case / "hf") for case in jobs}
    return found


@pytest.mark.parametrize("case", CASES)
def test_ranks_with_nothing_but_their_own_shards_convert_the_whole(case: str, outcomes: dict[str, Any]) -> None:
    answer, expected, target = outcomes[case]
    assert answer.exit_codes == [0] * len(answer.exit_codes), answer.stderr
    assert_same(read_tensors(target), expected)


#: Every tensor parallel set of these lies whole on one rank.
WHOLE_SETS = (
    "a stage a rank", "shards on several ranks", "all on the last rank", "experts, an expert rank a rank",
    "direct placement of whole stages",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_gathered_where_a_tensor_parallel_set_lies_on_several_ranks(
    case: str, outcomes: dict[str, Any]
) -> None:
    answer, _, _ = outcomes[case]
    assert (answer.outcome["gathered_bytes"] > 0) == (case not in WHOLE_SETS)


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_read_once_whatever_lies_on_several_ranks(case: str, outcomes: dict[str, Any]) -> None:
    answer, expected, _ = outcomes[case]
    assert answer.outcome["read_bytes"] == sum(tensor.nbytes for tensor in expected.values())


def test_rank_in_the_load_path_is_zero_without_torchrun(tmp_path: Path) -> None:
    expected = make(tmp_path / "rank0-0-0")
    assert convert(tmp_path / "rank{rank}-{local_rank}-{node}", tmp_path / "hf") == 0
    assert_same(read_tensors(tmp_path / "hf"), expected)
