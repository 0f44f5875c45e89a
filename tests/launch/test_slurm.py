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
from tests.docs.commands import differs
from tests.launch.slurm_cluster import TIMEOUT_SECONDS, Cluster, cluster, why_not
from tests.published import make_published


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def shown_after(words: str) -> tuple[str, ...]:
    """The log that docs/clusters.md shows after some words."""
    text = (REPOSITORY / "docs/clusters.md").read_text()
    return tuple(text[text.index(words) :].split("```")[1].splitlines()[1:])


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


#: DeepSeek-V3 with all of its layers, which are narrow, and eight experts.
NARROW = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "q_lora_rank": 16,
    "num_attention_heads": 8, "num_key_value_heads": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8, "n_group": 4,
}  # fmt: skip


def test_the_documented_job_script_converts_deepseek_v3(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    make_published(tmp_path / "models/DeepSeek-V3", "deepseek-v3", 2, **NARROW)
    text = (REPOSITORY / "docs/clusters.md").read_text()
    script = text[text.index("#!/usr/bin/env bash\n#SBATCH --job-name=deepseek-v3") :].partition("```")[0]
    for documented, here in (
        ("--nodes=4", "--nodes=2"),
        ("--cpus-per-task=16", "--cpus-per-task=2"),
        ("cd /shared/dist_convert && . .venv/bin/activate", f"cd {REPOSITORY}"),
    ):
        assert script.count(documented) == 1
        script = script.replace(documented, here)
    (tmp_path / "deepseek-v3.sbatch").write_text(script.replace("/shared/", f"{tmp_path}/"))
    env = {"MASTER_ADDR": "127.0.0.1", "PYTHON": sys.executable}
    words = ("sbatch", "--parsable", f"--output={slurm.directory}/%j.log", f"{tmp_path}/deepseek-v3.sbatch")
    job = slurm.wait(slurm.run(*words, env=env).strip())
    assert job.state == "COMPLETED", job.printed
    written = {path.parent.name for path in (tmp_path / "ckpts/deepseek-v3/iter_0000001").glob("*/model_optim_rng.pt")}
    assert written == {f"mp_rank_{n:02d}_{stage:03d}_{n:03d}" for n in range(8) for stage in range(8)}
    assert not differs(job.printed, shown_after("Its log, of a model")), job.printed


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
    assert ended.printed.count("are written already; resuming") == 1
    assert hashes(tmp_path / "hf") == hashes(tmp_path / "undisturbed" / "hf")
    if how == "its steps are signalled":
        assert not differs(ended.printed, shown_after("This is the log of a job")), ended.printed


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
    assert "requeued" not in job.printed


def test_a_job_without_a_target_on_the_command_line_says_what_it_needs(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.submit("megatron-to-hf", "--config", "job.yaml")
    assert job.state == "FAILED"
    assert job.printed.startswith("put SRC DST right after convert, or give the target with its flag")
