"""`--ranks N`: ranks of this machine without torchrun make the same bytes, and end together, saying once why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model, make
from tests.distributed.launching import Run, environment, flags, hashes
from tests.distributed.launching import run_program as run
from tests.warm import Process

MODEL = Model(hidden=512, ffn=4096, heads=8, groups=4, head_dim=64, layers=2)  # about 25 MB
HOW = "start the same command again; it continues where this one stopped"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    make(root, MODEL, Grid(tp=2))
    return root


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of what one rank makes."""
    target = tmp_path_factory.mktemp("undisturbed") / "hf"
    assert run(*flags(checkpoint, target)).returncode == 0
    return hashes(target)


def run_faulty(rank: int, fault: str, *arguments: str) -> Run:
    return run(str(rank), fault, *arguments, module="tests.distributed.programs.faulty_rank")


def assert_goes_on(checkpoint: Path, target: Path, undisturbed: dict[str, str]) -> None:
    assert not target.exists()
    assert (target.with_name("hf.partial") / "resumable").is_file()
    assert run(*flags(checkpoint, target), "--ranks", "2").returncode == 0
    assert hashes(target) == undisturbed


@pytest.mark.parametrize("placement", ["direct", "gather"])
@pytest.mark.parametrize("ranks", ["1", "2", "3"])
def test_ranks_without_torchrun_make_the_same_bytes(
    ranks: str, placement: str, checkpoint: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    done = run(*flags(checkpoint, tmp_path / "hf", "--placement", placement, "-v"), "--ranks", ranks)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "hf") == undisturbed
    assert f"\nrank {int(ranks) - 1} " in done.stderr
    assert f"\nrank {ranks} " not in done.stderr


def test_what_ranks_without_torchrun_made_goes_back_and_is_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    hf, megatron = tmp_path / "hf", tmp_path / "megatron"
    assert run(*flags(checkpoint, hf), "--ranks", "2", "--verify").returncode == 0
    back = ["hf-to-megatron", "--load-dir", str(hf), "--save-dir", str(megatron), "--ranks", "2"]
    done = run(*back, "--target-tensor-parallel-size", "4")
    assert done.returncode == 0, done.stderr
    compared = run("verify", str(checkpoint), str(megatron), "--ranks", "2")
    assert compared.returncode == 0, compared.stdout + compared.stderr


def test_a_difference_that_verify_finds_is_the_exit_code_and_no_failure(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make(other, replace(MODEL, layers=1), Grid(tp=2))
    compared = run("verify", str(checkpoint), str(other), "--ranks", "2")
    assert (compared.returncode, compared.stderr) == (1, "")
    assert compared.stdout.count("DIFFERENT") == 1


def test_each_rank_has_its_number_in_paths(checkpoint: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    for rank in (0, 1):
        (tmp_path / f"rank{rank}").mkdir()
        (tmp_path / f"rank{rank}" / f"mp_rank_0{rank}").symlink_to(checkpoint / "iter_0000004" / f"mp_rank_0{rank}")
    source = f"{tmp_path}/rank{{rank}}"
    done = run(*flags(source, tmp_path / "hf"), "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert {
        n: h for n, h in hashes(tmp_path / "hf").items() if n.endswith(".safetensors")
    }.items() <= undisturbed.items()


def test_the_exit_code_is_the_ranks_own(tmp_path: Path) -> None:
    done = run(*flags(tmp_path, tmp_path / "hf"), "--ranks", "2")
    assert done.returncode == 2
    assert done.stderr.count("no checkpoint\n") == 1
    assert "Traceback" not in done.stderr


def test_a_flag_without_meaning_is_named_once(checkpoint: Path, tmp_path: Path) -> None:
    done = run(*flags(checkpoint, tmp_path / "hf"), "--ranks", "2", "--private")
    assert (done.returncode, done.stderr.count("--private")) == (2, 1)


@pytest.mark.parametrize("device", ["cuda", "hpu"])
def test_accelerators_are_torchruns(device: str, tmp_path: Path) -> None:
    arguments = ["megatron-to-hf", "--load-path", str(tmp_path), "--save-path", str(tmp_path / "hf")]
    done = run(*arguments, "--ranks", "8", "--device", device)
    assert done.returncode == 2
    assert f"--ranks 8 --device {device}" in done.stderr
    assert "torchrun --nproc-per-node 8" in done.stderr


def test_a_rank_that_a_launcher_started_starts_no_others(checkpoint: Path, tmp_path: Path) -> None:
    done = run(*flags(checkpoint, tmp_path / "hf"), "--ranks", "2", RANK="0", WORLD_SIZE="1")
    assert done.returncode == 2
    assert "under torchrun and other launchers" in done.stderr


def test_ranks_of_a_job_file_are_started_and_the_command_line_wins(checkpoint: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"load-path: {checkpoint}\nsave-path: {tmp_path / 'hf'}\nranks: 3\n")
    shown = run("megatron-to-hf", "--config", str(job), "--dry-run")
    assert "3 ranks in 3 groups" in shown.stdout, shown.stderr
    shown = run("megatron-to-hf", "--config", str(job), "--dry-run", "--ranks", "1", RANK="0", WORLD_SIZE="1")
    assert "1 rank in 1 group," in shown.stdout, shown.stderr


def test_more_ranks_than_a_machine_can_serve_are_refused_before_any_starts(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    done = run(*flags(tmp_path, tmp_path / "hf"), "--ranks", str(16 * cores + 1))
    assert done.returncode == 2
    assert f"at most {16 * cores}, 16 for each of {cores} cores" in done.stderr


def test_a_launcher_whose_parent_ignores_its_childrens_end_still_learns_of_it(checkpoint: Path, tmp_path: Path) -> None:
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    job = [sys.executable, "-m", "dist_convert", *flags(checkpoint, tmp_path / "hf"), "--ranks", "2"]
    done = subprocess.run([sys.executable, "-c", ignoring, *job], env=environment(), timeout=60, check=False)
    assert done.returncode == 0
    assert (tmp_path / "hf").is_dir()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("placement", ["direct", "gather"])
def test_a_rank_that_is_killed_is_named_once_and_ends_the_others(
    rank: int, placement: str, checkpoint: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    done = run_faulty(rank, "kill", *flags(checkpoint, tmp_path / "hf", "--placement", placement), "--ranks", "2")
    assert done.returncode == 1
    assert done.stderr.count(f"rank {rank} was ended by SIGKILL") == done.stderr.count(HOW) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert_goes_on(checkpoint, tmp_path / "hf", undisturbed)


def test_a_rank_that_crashes_before_it_can_tell_the_others_is_named_and_ends_them(
    checkpoint: Path, tmp_path: Path
) -> None:
    program = """
import os, sys
import dist_convert.__main__ as command
as_it_is = command.be_rank
def be_rank(*arguments):
    if os.environ["RANK"] == "1":
        raise RuntimeError("nobody expects this")
    return as_it_is(*arguments)
command.be_rank = be_rank
sys.exit(command.main(sys.argv[1:]))
"""
    job = [*flags(checkpoint, tmp_path / "hf"), "--ranks", "2"]
    done = Process(["-c", program, *job], environment()).finish()
    assert done.returncode == 1
    assert done.stderr.count("rank 1 has crashed") == 1, done.stderr
    assert "nobody expects this" in done.stderr


def test_a_rank_that_is_stopped_is_named_and_killed(
    checkpoint: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    job = [*flags(checkpoint, tmp_path / "hf"), "--ranks", "2", "--timeout", "5"]
    done = run_faulty(1, "stop", *job)
    assert done.returncode == 1
    assert done.stderr.count("rank 1 on ") == 1, done.stderr
    assert done.stderr.count("killed rank 1: still running 20 s after a failure\n") == 1
    assert_goes_on(checkpoint, tmp_path / "hf", undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_ranks_that_have_just_been_started_ends_them_with_one_line(
    number: signal.Signals, checkpoint: Path, tmp_path: Path
) -> None:
    job = ["-m", "dist_convert", *flags(checkpoint, tmp_path / "hf"), "--ranks", "2"]
    with Process(job, environment()) as launcher:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        while len(children.read_text().split()) < 2:
            time.sleep(0.001)
        os.killpg(launcher.pid, number)
        printed = launcher.finish(120).stderr
    assert launcher.returncode == 128 + number
    assert 1 <= printed.count(f"stopped by {number.name}") <= 2, printed  # rank 0, and who can tell the others already
    assert "memory" not in printed
    assert "Traceback" not in printed


@contextmanager
def paused(tmp_path: Path, *job: str) -> Iterator[Process]:
    """A command with two ranks, whose rank 1 waits for the file `go` after it has moved its first bytes."""
    wait = tmp_path / "wait"
    # Without `waits` the whole directory is gone: the test was over before this looked.
    until_go = f"until [ -e {tmp_path}/go ] || ! [ -e {tmp_path}/waits ]; do sleep 0.05; done"
    wait.write_text(f"#!/bin/sh\ntrap '' TERM INT\ntouch {tmp_path}/waits\n{until_go}\n")
    wait.chmod(0o755)
    program = ["-m", "tests.distributed.programs.faulty_rank", "1", f"run:{wait}", *job, "--ranks", "2"]
    with Process(program, environment()) as launcher:
        deadline = time.monotonic() + 60
        while not (tmp_path / "waits").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield launcher
        (tmp_path / "go").touch()


@pytest.mark.parametrize("to", ["launcher", "all"])
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_ranks_with_its_exit_code(
    number: signal.Signals, exit_code: int, to: str, checkpoint: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    with paused(tmp_path, *flags(checkpoint, tmp_path / "hf", "--placement", "direct")) as launcher:
        (os.kill if to == "launcher" else os.killpg)(launcher.pid, number)  # Ctrl-C in a terminal goes to all
        (tmp_path / "go").touch()
        printed = launcher.finish(120).stderr
    assert launcher.returncode == exit_code
    assert printed.count(f"stopped by {number.name}") == printed.count(HOW) == 1, printed
    assert "Traceback" not in printed
    assert_goes_on(checkpoint, tmp_path / "hf", undisturbed)


@pytest.mark.parametrize("command", ["megatron-to-hf", "verify"])
def test_no_rank_outlives_the_process_that_started_it(command: str, checkpoint: Path, tmp_path: Path) -> None:
    job = flags(checkpoint, tmp_path / "hf") if command == "megatron-to-hf" else ["verify", *[str(checkpoint)] * 2]
    with paused(tmp_path, *job) as launcher:
        ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        assert len(ranks) == 2
        launcher.kill()
        deadline = time.monotonic() + 120
        while any(Path("/proc", rank).exists() for rank in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        printed = launcher.printed[1]
    assert not (tmp_path / "hf").exists()
    assert "[/" not in printed, printed
    assert "gloo" not in printed, printed
