"""`launch/slurm.sbatch` on a real Slurm of two nodes, where Debian's packages are installed."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model, make
from tests.converting import assert_same, convert, read_tensors
from tests.distributed.launching import REPOSITORY, flags, hashes
from tests.launch.slurm_cluster import TIMEOUT_SECONDS, Cluster, cluster, why_not


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


def test_the_documented_srun_line_converts_without_torchrun(slurm: Cluster, tmp_path: Path) -> None:
    expected = make(tmp_path / "megatron", Model(), Grid(tp=2))
    text = (REPOSITORY / "docs" / "clusters.md").read_text()
    lines = text[text.index("export MASTER_ADDR=") :]
    lines = lines[: lines.index(" megatron-to-hf ")]
    for documented, here in (
        ('$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)', "127.0.0.1"),
        ("8 * SLURM_NNODES", "2 * SLURM_NNODES"),
        ("--ntasks-per-node 8", "--ntasks-per-node 2"),
        ("dist-convert", f"{sys.executable} -m dist_convert"),
    ):
        assert lines.count(documented) == 1
        lines = lines.replace(documented, here)
    job = shlex.join(flags(tmp_path / "megatron", tmp_path / "hf", "--placement", "gather"))
    # As launch/slurm.sbatch asks for it: one task a node, which srun must not take over.
    size = ("--partition=all", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", f"--output={tmp_path}/printed")
    slurm.run("sbatch", "--wait", *size, f"--wrap=bash -c {shlex.quote(f'{lines} {job}')}")
    assert_same(read_tensors(tmp_path / "hf"), expected)


#: About 360 MB, of which ranks have written a little when they are found to have begun.
LARGE = Model(hidden=512, ffn=8192, heads=8, groups=4, head_dim=64, layers=12)

#: Who stops a job that is in the middle of its work, in which partition.
STOPPED: dict[str, tuple[str, Callable[[Cluster, str], object]]] = {
    "its steps are signalled": ("all", lambda slurm, job: slurm.run("scancel", "--signal=TERM", job)),
    "an operator requeues it": ("all", lambda slurm, job: slurm.run("scontrol", "requeue", job)),
    "a more urgent job takes its nodes": ("all", lambda slurm, _: take_nodes(slurm)),
    "the same, with time to end": ("patient", lambda slurm, _: take_nodes(slurm)),
}


def take_nodes(slurm: Cluster) -> None:
    """Submit a job that needs all cores of both nodes, and is more urgent than others."""
    size = ("--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--output=/dev/null")
    slurm.run("sbatch", *size, "--wrap=sleep 1")


def ranks_of(target: Path) -> list[int]:
    """The processes that convert to a target: those that torchrun has started, not torchrun."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if str(target) in words and "dist_convert" in words and "torch.distributed.run" not in words:
                found.append(int(process.name))
    return found


def hold_still(target: Path) -> list[int]:
    """Wait until a conversion has begun to write, and stop its ranks where they are; returns their processes."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not any(path.stat().st_size > 500 for path in target.parent.glob("hf.partial/.journal/run-*")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    ranks = ranks_of(target)
    for process in ranks:
        os.kill(process, signal.SIGSTOP)
    return ranks


@pytest.mark.parametrize("how", STOPPED)
def test_a_conversion_that_is_stopped_halfway_goes_back_into_the_queue_and_on_to_the_same_bytes(
    how: str, slurm: Cluster, tmp_path: Path
) -> None:
    partition, stop = STOPPED[how]
    make(tmp_path / "megatron", LARGE, Grid(tp=2))
    assert convert(tmp_path / "megatron", tmp_path / "undisturbed" / "hf", "--placement", "gather") == 0
    job = slurm.start(*flags(tmp_path / "megatron", tmp_path / "hf", "--placement", "gather"), partition=partition)
    ranks = hold_still(tmp_path / "hf")  # so that nothing is finished before Slurm has had its way
    assert len(ranks) == 2
    stop(slurm, job)
    time.sleep(1)
    for process in ranks:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)
    ended = slurm.wait(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), ended.printed
    assert ended.printed.count("are there already; going on") == 1
    assert hashes(tmp_path / "hf") == hashes(tmp_path / "undisturbed" / "hf")


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
    assert job.printed.startswith("give the target on the command line")
