"""The demo in a fresh clone, from an empty home: it installs what it needs, and ends with what to try next."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.warm import REPOSITORY

ENDS = """results are in .cache/demo; try next:
  . {clone}/.venv/bin/activate
  dist-convert convert .cache/demo/smollm2-megatron /tmp/smollm2-hf --to huggingface --ranks 2
  dist-convert help convert
"""


@pytest.mark.slow
def test_the_demo_runs_in_a_fresh_clone_with_the_package_alone_and_runs_again_without_installing(
    tmp_path: Path,
) -> None:
    clone, home = tmp_path / "clone", tmp_path / "home"
    home.mkdir()
    subprocess.run(["git", "clone", "-q", REPOSITORY, clone], check=True)
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    path = os.pathsep.join(one for one in os.environ["PATH"].split(os.pathsep) if "venv" not in one)
    env = {**kept, "HOME": str(home), "PATH": path}

    def run() -> str:
        done = subprocess.run(["launch/demo.sh"], cwd=clone, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "\nthe same model\n" in done.stdout
        assert done.stdout.endswith(ENDS.format(clone=clone))
        return done.stdout

    assert "pip install" in run()
    installed = {one.name.split("-")[0] for one in clone.glob(".venv/lib/python*/site-packages/*.dist-info")}
    assert {"torch", "transformers", "dist_convert"} <= installed
    assert not {"pytest", "megatron_core", "ruff"} & installed
    started = time.monotonic()
    assert "pip install" not in run()
    assert time.monotonic() - started < 40
