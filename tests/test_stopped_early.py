"""Ctrl-C and SIGTERM while the program is still starting: one line and the signal's exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OF_A_LAUNCHER = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
FLAGS = {
    "megatron-to-hf": ["--load-path", "in", "--save-path", "out"],
    "hf-to-megatron": ["--load-dir", "in", "--save-dir", "out"],
    "verify": ["in", "out"],
}


@pytest.fixture
def slow_torch(tmp_path: Path) -> Path:
    """A directory with a torch that takes a minute to import; it says when that has begun."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        # Short sleeps: Python's handlers wait for the end of one that the signal came just before.
        "import pathlib, time\npathlib.Path(__file__).with_name('begun').touch()\n"
        "for _ in range(6000):\n    time.sleep(0.01)\n"
    )
    return tmp_path


def wait_until_begun(slow_torch: Path) -> None:
    deadline = time.monotonic() + 60
    while not (slow_torch / "torch" / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("command", FLAGS)
@pytest.mark.parametrize(
    ("number", "rank", "said"),
    [
        (signal.SIGINT, "0", "stopped by SIGINT\n"),
        (signal.SIGTERM, "0", "stopped by SIGTERM\n"),
        (signal.SIGINT, "1", ""),  # rank 0 says it
    ],
)
def test_a_signal_while_torch_is_imported_ends_with_one_line(
    number: signal.Signals, rank: str, said: str, command: str, slow_torch: Path
) -> None:
    env = os.environ | {"PYTHONPATH": f"{slow_torch}:{ROOT}", "RANK": rank, **OF_A_LAUNCHER}
    line = [sys.executable, "-m", "dist_convert", command, *FLAGS[command]]
    with subprocess.Popen(line, env=env, cwd=slow_torch, stderr=subprocess.PIPE, text=True) as process:
        wait_until_begun(slow_torch)
        process.send_signal(number)
        assert process.communicate(timeout=30)[1] == said
    assert process.returncode == 128 + number


def test_a_signal_ends_the_program_where_nobody_reads_its_line_any_more(slow_torch: Path) -> None:
    env = os.environ | {"PYTHONPATH": f"{slow_torch}:{ROOT}", "RANK": "0"}
    line = [sys.executable, "-m", "dist_convert", "verify", *FLAGS["verify"]]
    with subprocess.Popen(line, env=env, cwd=slow_torch, stderr=subprocess.PIPE, text=True) as process:
        wait_until_begun(slow_torch)
        assert process.stderr is not None
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
