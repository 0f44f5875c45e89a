"""Launch scripts as far as what they give Python and docker; `distributed/test_progress.py` has `local.sh` run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model, make
from tests.distributed.launching import REPOSITORY, environment


def launch(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [str(REPOSITORY / "launch" / script), *arguments]
    return subprocess.run(command, env=environment(**env), capture_output=True, text=True, check=False)


@pytest.fixture
def words(tmp_path: Path) -> Callable[..., list[str]]:
    """Has a script hand its words to a program that gives them back, in place of Python or docker."""
    program = tmp_path / "program"
    program.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@"\n')
    program.chmod(0o755)

    def run(script: str, stands_for: str, *arguments: str, **env: str) -> list[str]:
        done = launch(script, *arguments, **{stands_for: str(program), **env})
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\0")[:-1]

    return run


@pytest.mark.parametrize("ranks", ["3", ""])
def test_local_sh_starts_the_ranks_it_is_told_or_some_for_the_cores_and_hands_words_on(
    ranks: str, words: Callable[..., list[str]]
) -> None:
    arguments = ("megatron-to-hf", "--load-path", "/data/a b", "--save-path", "/data/hf")
    found = words("local.sh", "PYTHON", *arguments, RANKS=ranks, PATH="/usr/bin:/bin")
    assert found[:2] == ["-m", "torch.distributed.run"]
    number = found.index("--nproc-per-node") + 1
    assert found[number] == ranks or (not ranks and int(found[number]) > 0)
    assert found[number + 1 :] == ["-m", "dist_convert", *arguments]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="earlier Pythons do not know PYTHONSAFEPATH")
def test_local_sh_imports_nothing_from_the_current_directory(tmp_path: Path) -> None:
    make(tmp_path / "in", Model(), Grid(tp=2))
    for name in ("torch", "yaml", "fractions"):
        (tmp_path / f"in/{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()")
    command = [str(REPOSITORY / "launch/local.sh"), "convert", ".", f"{tmp_path}/out", "--to", "huggingface"]
    env = environment(RANKS="2", PYTHON=sys.executable)
    done = subprocess.run(command, cwd=tmp_path / "in", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "canary").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root may hide this machine's /etc/hosts from a program")
def test_local_sh_starts_ranks_where_neither_localhost_nor_the_machine_has_an_address(tmp_path: Path) -> None:
    make(tmp_path / "in", Model(), Grid(tp=2))
    (tmp_path / "hosts").touch()
    (tmp_path / "nsswitch.conf").write_text("hosts: files\n")
    hide = "; ".join(f"mount --bind {tmp_path}/{name} /etc/{name}" for name in ("hosts", "nsswitch.conf"))
    start = f"{hide}; ! getent ahosts localhost; launch/local.sh convert {tmp_path}/in {tmp_path}/out --to huggingface"
    command = ["unshare", "--mount", "bash", "-ec", f"{start} --placement gather"]
    env = environment(RANKS="2", PYTHON=sys.executable)
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"\ndone: {tmp_path}/out" in done.stderr


def test_gaudi_docker_sh_gives_the_container_cards_directories_and_the_conversion(
    words: Callable[..., list[str]],
) -> None:
    found = words(
        "gaudi-docker.sh", "DOCKER", "megatron-to-hf", "--load-path", "/data/a b", "--save-path", "/data/hf",
        HABANA_VISIBLE_DEVICES="0,1", MOUNTS="/data /scratch", IMAGE="intel", RANKS="2",
    )  # fmt: skip
    image = found.index("intel")
    given = found[:image]
    assert given[:2] == ["run", "--rm"]
    assert {"--runtime=habana", "--ipc=host", "--cap-add=sys_nice"} <= set(given)
    pairs = set(pairwise(given))
    assert {("--env", "HABANA_VISIBLE_DEVICES=0,1"), ("--env", "RANKS")} <= pairs
    assert {("--volume", "/data:/data"), ("--volume", "/scratch:/scratch")} <= pairs
    assert found[image + 1 : image + 3] == ["bash", "-c"]
    assert "--device hpu" in found[image + 3]
    assert found[image + 5 :] == ["megatron-to-hf", "--load-path", "/data/a b", "--save-path", "/data/hf"]
