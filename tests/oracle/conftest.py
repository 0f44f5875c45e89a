"""Checkpoints and logits by the real megatron-core, made once for all tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_WRITER = Path(__file__).parent / "megatron_writer.py"


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with CASE/iter_0000004/... and CASE/oracle.pt for every case, written by 8 ranks."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (pip install -e '.[test]')")
    directory = tmp_path_factory.mktemp("oracle")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
    done = subprocess.run(
        [*command, str(_WRITER), str(directory)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return directory
