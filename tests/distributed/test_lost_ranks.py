"""A rank that fails while others move data or wait for it in a collective: all end, and say why once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model, make
from tests.distributed.launching import REPOSITORY, Run, environment, flags, run_ranks, torchrun

#: About 25 MB in blocks of 4 MiB, so that most of it is still to be read after the first step was written.
MODEL = Model(hidden=512, ffn=4096, heads=8, groups=4, head_dim=64, layers=2)
ITERATION = "iter_0000004"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """TP2, and the directories `rank0` and `rank1` with one shard each."""
    make(tmp_path / "both", MODEL, Grid(tp=2))
    for rank in (0, 1):
        (tmp_path / f"rank{rank}").mkdir()
        (tmp_path / "both" / ITERATION / f"mp_rank_0{rank}").rename(tmp_path / f"rank{rank}" / f"mp_rank_0{rank}")
    return tmp_path


def convert(root: Path, target: Path, *faulty: str, start: Callable[..., Run] = run_ranks) -> Run:
    """Gather on two ranks, one of which meets a fault, if one is given."""
    job = flags(f"{root}/rank{{rank}}", target, "--placement", "gather", "--max-memory-per-rank", "76MB")
    run = start(2, *faulty, *job, module="tests.distributed.programs.faulty_rank" if faulty else "dist_convert")
    assert run.returncode != 0
    assert not target.exists()
    assert f'File "{REPOSITORY}/dist_convert' not in run.stderr  # a traceback of ours
    assert "terminate called" not in run.stderr
    return run


@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_whose_file_is_cut_short_meanwhile_says_so_and_all_leave(rank: int, checkpoint: Path) -> None:
    file = checkpoint / f"rank{rank}" / f"mp_rank_0{rank}" / "model_optim_rng.pt"
    run = convert(checkpoint, checkpoint / "hf", str(rank), f"cut:{file}")
    assert run.stderr.count("a source file has changed while it was read") == 1
    assert run.stderr.count("cut or replaced since") == 1
    assert run.stderr.count(f"mp_rank_0{rank}/model_optim_rng.pt") == 1
    assert "lost contact" not in run.stderr


def test_under_torchrun_a_rank_that_is_killed_takes_the_others_with_it(checkpoint: Path) -> None:
    run = convert(checkpoint, checkpoint / "hf", "1", "kill", start=torchrun)
    assert run.stderr.count("lost contact with another rank") <= 1  # torchrun may end rank 0 first
    assert "exitcode  : -9" in run.stderr


def test_the_others_end_where_the_rank_that_prints_is_killed(checkpoint: Path) -> None:
    assert convert(checkpoint, checkpoint / "hf", "0", "kill").returncode == -9


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "--ranks"])
def test_a_launcher_that_is_killed_leaves_a_message_and_no_frames_of_cpp(launcher: str, tmp_path: Path) -> None:
    make(tmp_path / "in", Model(hidden=1024, ffn=8192, heads=8, groups=4, head_dim=128, layers=8), Grid(tp=2))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if launcher == "torchrun" else []
    job = ["-m", "dist_convert", *flags(tmp_path / "in", tmp_path / "hf", "--placement", "gather")]
    line = [sys.executable, *start, *job, *([] if start else ["--ranks", "2"])]
    with (
        (tmp_path / "said").open("w") as said,
        subprocess.Popen(line, cwd=REPOSITORY, env=environment(), stdout=said, stderr=said) as process,
    ):
        while process.poll() is None and not (tmp_path / "hf.partial").exists():
            time.sleep(0.02)
        process.kill()
    for _ in range(600):
        text = (tmp_path / "said").read_text()
        if "resume:" in text or "done:" in text:  # ranks of torchrun may be done before they miss it
            break
        time.sleep(0.1)
    assert "resume:" in text or (launcher == "torchrun" and "done:" in text)
    assert "frame #" not in text
    assert "c10d" not in text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "none", str(disk)]).returncode:
        pytest.skip("mounting a file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_meanwhile_is_named_once(checkpoint: Path, small_disk: Path) -> None:
    run = convert(checkpoint, small_disk / "hf", "1", f"fill:{small_disk}/other")
    assert run.stderr.count("No space left on device") == 1
    assert run.stderr.count("cannot write the target") == 1


def test_an_error_in_the_header_of_one_ranks_file_ends_all(checkpoint: Path) -> None:
    os.truncate(checkpoint / "rank1" / "mp_rank_01" / "model_optim_rng.pt", 5000)
    run = convert(checkpoint, checkpoint / "hf")
    assert run.stderr.count("not a complete torch checkpoint file") == 1


def test_wrong_usage_is_named_once_by_torchruns_ranks_and_again_at_the_end_of_its_report(tmp_path: Path) -> None:
    run = torchrun(2, *flags(tmp_path, tmp_path / "hf", "--fast"))
    assert run.returncode != 0
    ours, _, torchruns = run.stderr.partition("ChildFailedError")
    assert ours.count("unrecognized arguments: --fast") == 1
    _, _, root_cause = torchruns.partition("Root Cause")  # the last part of torchrun's report
    assert "traceback : dist-convert megatron-to-hf: unrecognized arguments: --fast\n" in root_cause
    assert run.stderr.count("exitcode  : 2") >= 1
