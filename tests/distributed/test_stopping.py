"""A rank that is told to stop, or that hangs: all ranks end within seconds, say why once, and can be started again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model, make
from tests.distributed.interrupting import Run, Runs, hashes_below
from tests.distributed.launching import command, environment, flags

MODEL = Model(hidden=64, ffn=192, heads=8, groups=4, head_dim=8, layers=3, vocab=200, padded_vocab=256)
HOW = "start the same command again; it continues where this one stopped"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    make(root, MODEL, Grid(tp=2, pp=3))
    return root


def assert_resumes(runs: Runs, checkpoint: Path, target: Path) -> None:
    """With one rank more and without placement, to the bytes of an undisturbed run."""
    assert not target.exists()
    assert (target.with_name("hf.partial") / "resumable").is_file()
    assert runs.do(flags(checkpoint, target), ranks=3).exit_codes == [0, 0, 0]
    assert runs.do(flags(checkpoint, target.parent / "undisturbed" / "hf")).exit_codes == [0]
    assert hashes_below(target) == hashes_below(target.parent / "undisturbed" / "hf")


@pytest.mark.parametrize("placement", ["direct", "gather"])
@pytest.mark.parametrize(
    ("signals", "exit_code"), [(["SIGTERM"], 143), (["SIGTERM"] * 3, 143), (["SIGINT"], 130)], ids=str
)
def test_a_signal_to_one_rank_ends_all_cleanly_and_soon(
    signals: list[str], exit_code: int, placement: str, runs: Runs, checkpoint: Path, tmp_path: Path
) -> None:
    run = runs.do(
        flags(checkpoint, tmp_path / "hf", "--placement", placement),
        ranks=2, rank=1, moment=40, signals=signals, patience_seconds=30.0,
    )  # fmt: skip
    assert run.exit_codes == [exit_code] * 2, run.printed
    assert run.seconds < 10
    assert run.printed.count(f"stopped by {signals[0]}") == run.printed.count(HOW) == 1
    assert "Traceback" not in run.printed
    assert_resumes(runs, checkpoint, tmp_path / "hf")


def test_a_single_rank_stops_too(runs: Runs, checkpoint: Path, tmp_path: Path) -> None:
    run = runs.do(flags(checkpoint, tmp_path / "hf"), rank=0, moment=60, signals=["SIGTERM"])
    assert run.exit_codes == [143]
    assert run.printed.count("stopped by SIGTERM") == 1
    assert_resumes(runs, checkpoint, tmp_path / "hf")


def hang(runs: Runs, checkpoint: Path, target: Path, rank: int, placement: str) -> Run:
    return runs.do(
        flags(checkpoint, target, "--placement", placement, "--timeout", "5"),
        ranks=2, rank=rank, moment=45, signals=["SIGSTOP"], pause_seconds=2.5, patience_seconds=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(("rank", "placement"), [(0, "gather"), (1, "gather"), (1, "direct")])
def test_a_rank_that_hangs_is_named_with_its_step_by_one_that_does_not(
    rank: int, placement: str, runs: Runs, checkpoint: Path, tmp_path: Path
) -> None:
    run = hang(runs, checkpoint, tmp_path / "hf", rank, placement)
    assert run.exit_codes[1 - rank] == 1
    assert run.seconds < 20
    assert run.printed.count(f"rank {rank} on ") == 1, run.printed
    assert "ing step " in run.printed
    assert run.printed.count(HOW) == 1
    assert_resumes(runs, checkpoint, tmp_path / "hf")


def test_torchrun_that_is_told_to_end_ends_its_ranks_with_143(tmp_path: Path) -> None:
    large = Model(hidden=512, ffn=8192, heads=8, groups=4, head_dim=64, layers=12)  # about 360 MB
    make(tmp_path / "in", large, Grid(tp=2))
    line = command(2, *flags(tmp_path / "in", tmp_path / "hf", "--placement", "gather"))
    with subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True) as torchrun:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("hf.partial/.journal/run-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(2):
            os.kill(torchrun.pid, signal.SIGTERM)
            time.sleep(0.05)
        printed = torchrun.communicate(timeout=30)[1]
    assert torchrun.returncode != 0
    assert printed.count("stopped by SIGTERM") == printed.count(HOW) == 1, printed
    assert (tmp_path / "hf.partial" / "resumable").is_file()
    assert not (tmp_path / "hf").exists()
