"""Ranks on several machines, and ranks that another launcher than torchrun started."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.checkpoints import Grid, Model, make
from tests.converting import assert_same, read_tensors
from tests.distributed.launching import TIMEOUT_SECONDS, Run, command, environment, flags

ITERATION = "iter_0000004"


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def run_together(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> list[Run]:
    """Run commands at the same time; stops all of them where one hangs."""
    running = [
        subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line, env in zip(commands, environments, strict=True)
    ]
    try:
        printed = [process.communicate(timeout=TIMEOUT_SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    return [Run(process.returncode, *texts) for process, texts in zip(running, printed, strict=True)]


def on_two_nodes(ranks_each: int, *job: str) -> list[Run]:
    """The two torchruns of a run on two machines, both of them this one."""
    meeting = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", free_port())
    commands = [command(ranks_each, *job, nodes=(*meeting, "--node-rank", node)) for node in "01"]
    return run_together(commands, [environment()] * 2)


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
    runs = run_together(
        [[sys.executable, "-m", "dist_convert", *job]] * 2,
        [environment(RANK=rank, LOCAL_RANK=rank, **meeting) for rank in "01"],
    )
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    assert_same(read_tensors(tmp_path / "hf"), expected)
