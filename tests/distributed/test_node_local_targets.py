"""A Megatron target on the nodes' own disks: each node gets the rank directories that its training processes load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model
from tests.distributed.launching import Run, on_two_nodes
from tests.to_megatron import FILE, TRACKER, grid_flags, make_hf, to_megatron

LLAMA = Model(hidden=512, ffn=4608, heads=8, groups=4, head_dim=64, layers=2, vocab=1001)
MIXTRAL = Model(hidden=256, ffn=512, heads=4, groups=2, head_dim=64, layers=2, vocab=99, experts=4)

#: Model, grid, training processes a node, and what each of two nodes gets.
CASES: dict[str, tuple[Model, Grid, int, list[list[str]]]] = {
    "a stage a node": (LLAMA, Grid(pp=2), 1, [["mp_rank_00_000"], ["mp_rank_00_001"]]),
    "a tensor rank a node": (LLAMA, Grid(tp=2), 1, [["mp_rank_00"], ["mp_rank_01"]]),
    "a whole replica a node": (LLAMA, Grid(tp=2), 2, [["mp_rank_00", "mp_rank_01"]] * 2),
    "experts of both nodes": (
        MIXTRAL, Grid(tp=2, ep=2), 2, [["mp_rank_00_000", "mp_rank_01_000"], ["mp_rank_00_001", "mp_rank_01_001"]],
    ),
}  # fmt: skip


def convert_on_two_nodes(root: Path, grid: Grid, *flags: str) -> list[Run]:
    """Two ranks on nodes of their own, each with its own directory for the target."""
    target = ["--save-dir", f"{root}/node{{node}}", "--make-vocab-size-divisible-by", "4", "--device", "cpu"]
    return on_two_nodes(1, "hf-to-megatron", "--load-dir", str(root / "hf"), *target, *grid_flags(grid), *flags)


def directories(iteration: Path) -> list[str]:
    return sorted(path.name for path in iteration.iterdir() if path.name.startswith("mp_rank"))


@pytest.mark.parametrize("name", CASES)
def test_each_node_gets_the_bytes_of_its_rank_directories_and_no_others(name: str, tmp_path: Path) -> None:
    model, grid, processes, expected = CASES[name]
    make_hf(tmp_path / "hf", model)
    assert to_megatron(tmp_path / "hf", tmp_path / "whole", grid=grid) == 0
    runs = convert_on_two_nodes(tmp_path, grid, "--target-ranks-per-node", str(processes))
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    for node in (0, 1):
        root = tmp_path / f"node{node}"
        assert directories(root / "iter_0000001") == expected[node]
        assert (root / TRACKER).read_text() == (tmp_path / "whole" / TRACKER).read_text()
        for directory in expected[node]:
            whole = tmp_path / "whole" / "iter_0000001" / directory / FILE
            assert (root / "iter_0000001" / directory / FILE).read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("**/.dist_convert*"))


def test_no_source_row_is_read_by_two_nodes_although_both_write_it(tmp_path: Path) -> None:
    tensors = make_hf(tmp_path / "hf", LLAMA)
    runs = convert_on_two_nodes(tmp_path, Grid(tp=2), "--target-ranks-per-node", "2", "--vocab-padding", "zeros", "-v")
    assert sum(tensor.nbytes for tensor in tensors.values()) == 33_512_448
    assert "\nread 33.5 MB, wrote 67 MB in " in runs[0].stderr


REFUSED: dict[str, tuple[Sequence[str], str]] = {
    "without the flag": ((), "the target is not the same directory on all nodes"),
    "too few training processes": (
        ("--target-ranks-per-node", "1"),
        "2 nodes with 1 training processes each do not hold whole replicas of TP2 PP2 VPP1 EP1 ETP2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_target_that_no_flag_explains_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    flags, message = REFUSED[name]
    make_hf(tmp_path / "hf", LLAMA)
    runs = convert_on_two_nodes(tmp_path, Grid(tp=2, pp=2), *flags)
    assert all(run.returncode for run in runs)
    assert "".join(run.stderr for run in runs).count(message) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
