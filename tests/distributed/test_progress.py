"""One bar on rank 0's terminal over the bytes of all ranks, none where it is a pipe, and one line at the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model, make
from tests.distributed.launching import REPOSITORY, environment, flags, run_ranks

#: 53.5 MB in bf16.
MODEL = Model(hidden=512, ffn=8192, heads=8, groups=4, head_dim=64, layers=2)


def run_on_terminal(line: list[str], **env: str) -> str:
    """Run a command whose output is a terminal of 100 columns; returns what it shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))
    with subprocess.Popen(line, stdout=theirs, stderr=theirs, stdin=theirs, env=environment(**env)) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the last process with the terminal has ended
                break
            shown += part
        os.close(ours)
    assert process.returncode == 0, shown.decode()
    return shown.decode()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TP2 checkpoint."""
    root = tmp_path_factory.mktemp("megatron")
    make(root, MODEL, Grid(tp=2))
    return root


@pytest.fixture(scope="module")
def shown(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a terminal shows while two ranks of a torchrun convert, as a user starts it on one machine."""
    target = tmp_path_factory.mktemp("hf")
    start = str(REPOSITORY / "launch" / "local.sh")
    return run_on_terminal([start, *flags(checkpoint, target, "--placement", "gather")], RANKS="2")


def bars(shown: str) -> list[str]:
    """Every state of a bar that was drawn."""
    return [text.strip() for text in re.split(r"[\r\n]+", shown) if re.search(r"\d+%\|", text)]


def test_the_bar_reaches_the_bytes_of_all_ranks(shown: str) -> None:
    assert re.search(r"converting: 100%\|.*\| 53\.5M/53\.5M \[", bars(shown)[-1]), bars(shown)


def test_the_bar_shows_rate_and_time_left(shown: str) -> None:
    assert all(re.search(r"\[\d\d:\d\d<[\d:?]+, +[\d.?]+ ?[kMG]?B/s\]", bar) for bar in bars(shown)), bars(shown)


def test_one_rank_shows_one_bar_in_one_line(shown: str) -> None:
    assert sum("converting:" in line for line in shown.split("\n")) == 1, shown


def test_a_pipe_gets_no_bar_but_the_line_at_the_end(checkpoint: Path, tmp_path: Path) -> None:
    run = run_ranks(2, *flags(checkpoint, tmp_path / "hf"))
    assert bars(run.stderr + run.stdout) == []
    first, *_, last = run.stderr.splitlines()
    ends = rf"{checkpoint}/iter_\d+ \(torch\) -> {tmp_path}/hf \(huggingface\), 53\.5 MB"
    made = r"LlamaForCausalLM, TP2 PP1 VPP1 EP1 ETP2"
    assert re.fullmatch(rf"dist_convert [\d.]+: {made}, {ends}, 2 ranks on 1 node, direct placement", first), run.stderr
    assert re.fullmatch(rf"done: {tmp_path}/hf  1 file, 53\.5 MB, [\d.]+ s", last), last


def test_the_last_line_tells_the_ranks_memory_and_not_that_of_its_parent(tmp_path: Path) -> None:
    make(tmp_path / "megatron")
    held = bytearray(800_000_000)
    held[::4096] = b"x" * len(held[::4096])  # a process inherits its parent's peak in ru_maxrss
    job = [sys.executable, "-m", "dist_convert", *flags(tmp_path / "megatron", tmp_path / "hf", "-v")]
    done = subprocess.run(job, env=environment(), stderr=subprocess.PIPE, text=True, check=True)
    peak = re.search(r"peak memory of the largest rank ([\d.]+) MB", done.stderr)
    assert peak is not None, done.stderr
    assert float(peak[1]) < 700
