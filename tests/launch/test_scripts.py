"""Launch scripts: `local.sh` runs here; `gaudi-docker.sh` as far as the command that it gives docker."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from tests.checkpoints import Grid, Model, make
from tests.converting import assert_same, read_tensors
from tests.distributed.launching import REPOSITORY, environment, flags


def launch(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [str(REPOSITORY / "launch" / script), *arguments]
    return subprocess.run(
        command, env=environment(PYTHON=sys.executable, **env), capture_output=True, text=True, check=False
    )


def test_local_sh_converts_with_as_many_ranks_as_it_is_told(tmp_path: Path) -> None:
    expected = make(tmp_path / "megatron", Model(), Grid(tp=2))
    done = launch("local.sh", *flags(tmp_path / "megatron", tmp_path / "hf", "--placement", "gather"), RANKS="2")
    assert done.returncode == 0, done.stderr
    assert_same(read_tensors(tmp_path / "hf"), expected)


def test_local_sh_hands_spaces_in_names_on_and_starts_ranks_for_the_cores_by_itself(tmp_path: Path) -> None:
    make(tmp_path / "a checkpoint", Model(layers=1))
    done = launch(
        "local.sh", *flags(tmp_path / "a checkpoint", tmp_path / "a model", "--dry-run"), PATH="/usr/bin:/bin"
    )
    assert done.returncode == 0, done.stderr
    assert f"below {tmp_path}/a model" in done.stdout


def test_gaudi_docker_sh_gives_the_container_cards_directories_and_the_conversion(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@"\n')
    docker.chmod(0o755)
    done = launch(
        "gaudi-docker.sh", "megatron-to-hf", "--load-path", "/data/a b", "--save-path", "/data/hf",
        DOCKER=str(docker), HABANA_VISIBLE_DEVICES="0,1", MOUNTS="/data /scratch", IMAGE="intel", RANKS="2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("\0")[:-1]
    image = words.index("intel")
    given = words[:image]
    assert given[:2] == ["run", "--rm"]
    assert {"--runtime=habana", "--ipc=host", "--cap-add=sys_nice"} <= set(given)
    pairs = set(pairwise(given))
    assert {("--env", "HABANA_VISIBLE_DEVICES=0,1"), ("--env", "RANKS")} <= pairs
    assert {("--volume", "/data:/data"), ("--volume", "/scratch:/scratch")} <= pairs
    assert words[image + 1 : image + 3] == ["bash", "-c"]
    assert "--device hpu" in words[image + 3]
    assert words[image + 5 :] == ["megatron-to-hf", "--load-path", "/data/a b", "--save-path", "/data/hf"]
