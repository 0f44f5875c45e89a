"""`launch/slurm.sbatch` on a real Slurm of two nodes, where Debian's packages are installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model, make
from tests.converting import assert_same, read_tensors
from tests.distributed.launching import flags
from tests.launch.slurm_cluster import Cluster, cluster, why_not


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def python_that_is_stopped(directory: Path, until_restart: int) -> str:
    """A `PYTHON` that fails and leaves an unfinished target, as a conversion that is stopped, until it is restarted."""
    program = directory / "python"
    partial = directory / "hf.partial"
    program.write_text(
        "#!/usr/bin/env bash\n"
        f"if ((${{SLURM_RESTART_COUNT:-0}} < {until_restart})); then\n"
        f"    mkdir -p {partial} && touch {partial}/resumable && exit 1\n"
        "fi\n"
        f'rm -rf {partial} && exec {sys.executable} "$@"\n'
    )
    program.chmod(0o755)
    return str(program)


def test_a_job_converts_on_all_of_its_nodes_each_of_which_reads_its_own_shards(slurm: Cluster, tmp_path: Path) -> None:
    expected = make(tmp_path / "whole", Model(), Grid(tp=2))
    for node in (0, 1):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / "whole" / "iter_0000004" / f"mp_rank_0{node}").rename(tmp_path / f"node{node}" / f"mp_rank_0{node}")
    job = slurm.submit(*flags(f"{tmp_path}/node{{node}}", tmp_path / "hf"))
    assert (job.state, job.restarts) == ("COMPLETED", 0), job.printed
    assert_same(read_tensors(tmp_path / "hf"), expected)


def test_a_job_that_was_stopped_puts_itself_back_into_the_queue_and_ends(slurm: Cluster, tmp_path: Path) -> None:
    expected = make(tmp_path / "megatron", Model(layers=1))
    job = slurm.submit(
        *flags(tmp_path / "megatron", tmp_path / "hf"), PYTHON=python_that_is_stopped(tmp_path, until_restart=1)
    )
    assert (job.state, job.restarts) == ("COMPLETED", 1), job.printed
    assert "back into the queue to go on" in job.printed
    assert_same(read_tensors(tmp_path / "hf"), expected)


def test_a_job_starts_again_no_more_often_than_it_may(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.submit(
        *flags(tmp_path / "megatron", tmp_path / "hf"),
        PYTHON=python_that_is_stopped(tmp_path, until_restart=99),
        MAX_RESTARTS="2",
    )
    assert (job.state, job.restarts) == ("FAILED", 2), job.printed


def test_a_job_that_fails_and_leaves_nothing_to_go_on_with_is_not_started_again(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.submit(*flags(tmp_path / "nothing", tmp_path / "hf"))
    assert (job.state, job.restarts) == ("FAILED", 0), job.printed
    assert "back into the queue" not in job.printed


def test_a_job_without_a_target_on_the_command_line_says_what_it_needs(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.submit("megatron-to-hf", "--config", "job.yaml")
    assert job.state == "FAILED"
    assert job.printed.startswith("give --save-path or --save-dir on the command line")
