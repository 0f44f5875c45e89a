"""Checkpoints and logits by the real megatron-core, made once for all tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

#: Runs a script of this folder on N ranks with arguments.
Torchrun = Callable[..., None]


@pytest.fixture(scope="session")
def torchrun() -> Torchrun:
    """Run one of the scripts that need megatron-core, on that many ranks."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (pip install -e '.[test]')")

    def run(script: str, ranks: int, *arguments: object) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        done = subprocess.run(
            [*command, str(Path(__file__).parent / script), *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-4000:]

    return run


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory, torchrun: Torchrun) -> Path:
    """A directory with CASE/iter_0000004/... and CASE/oracle.pt for every case, written by 8 ranks."""
    directory = tmp_path_factory.mktemp("oracle")
    torchrun("megatron_writer.py", 8, directory)
    return directory
