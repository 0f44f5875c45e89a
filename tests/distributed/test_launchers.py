"""Ranks on several machines, and ranks that another launcher than torchrun started."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tests.checkpoints import Grid, Model, make
from tests.converting import assert_same, read_tensors
from tests.distributed.launching import environment, flags, free_port, on_two_nodes
from tests.warm import Process

ITERATION = "iter_0000004"


def node_directories(root: Path) -> None:
    """`node0` has the shards of tensor rank 0 of both stages, `node1` those of tensor rank 1."""
    for node in (0, 1):
        (root / f"node{node}" / ITERATION).mkdir(parents=True)
        for stage in ("000", "001"):
            name = f"mp_rank_0{node}_{stage}"
            (root / "whole" / ITERATION / name).rename(root / f"node{node}" / ITERATION / name)


def test_the_ranks_of_a_node_share_its_directory(tmp_path: Path) -> None:
    expected = make(tmp_path / "whole", Model(), Grid(tp=2, pp=2))
    node_directories(tmp_path)
    runs = on_two_nodes(2, *flags(f"{tmp_path}/node{{node}}", tmp_path / "hf", "--ckpt-dir-name", ITERATION))
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    assert_same(read_tensors(tmp_path / "hf"), expected)


def test_an_error_on_one_node_is_printed_once_and_ends_both(tmp_path: Path) -> None:
    make(tmp_path / "whole", Model(), Grid(tp=2, pp=2))
    node_directories(tmp_path)
    (tmp_path / "node1" / ITERATION / "mp_rank_01_001" / "model_optim_rng.pt").write_bytes(b"PK")
    runs = on_two_nodes(1, *flags(f"{tmp_path}/node{{node}}", tmp_path / "hf", "--ckpt-dir-name", ITERATION))
    assert all(run.returncode for run in runs)
    assert "".join(run.stderr for run in runs).count("not a complete torch checkpoint file") == 1
    assert not (tmp_path / "hf").exists()


def test_a_launcher_that_only_sets_torchs_variables_will_do(tmp_path: Path) -> None:
    expected = make(tmp_path / "megatron", Model(), Grid(tp=2))
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    job = flags(tmp_path / "megatron", tmp_path / "hf", "--placement", "gather")
    with ExitStack() as stack:
        ranks = [
            Process(["-m", "dist_convert", *job], environment(RANK=rank, LOCAL_RANK=rank, **meeting)) for rank in "01"
        ]
        runs = [stack.enter_context(rank).finish() for rank in ranks]
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    assert_same(read_tensors(tmp_path / "hf"), expected)


def test_without_torchrun_a_wrong_flag_of_one_rank_ends_all_at_once(tmp_path: Path) -> None:
    make(tmp_path / "megatron", Model(), Grid(tp=2))
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    jobs = [flags(tmp_path / "megatron", tmp_path / "hf"), ["megatron-to-hf", "--config", str(tmp_path / "none.yaml")]]
    for first, second in (jobs, jobs[::-1]):
        with ExitStack() as stack:
            ranks = [
                stack.enter_context(
                    Process(["-m", "dist_convert", *job], environment(RANK=rank, LOCAL_RANK=rank, **meeting))
                )
                for rank, job in zip("01", (first, second), strict=True)
            ]
            runs = [rank.finish() for rank in ranks]
        assert [run.returncode for run in runs] == [2, 2]
        assert "".join(run.stderr for run in runs).count("none.yaml") == 1
