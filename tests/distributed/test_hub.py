"""Several ranks and a hub: what takes longer than ranks wait for each other is waited for, or left to one of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model, make
from tests.distributed.launching import REPOSITORY, Run, run_ranks
from tests.hub_stand_in import Hub, Repository, serving
from tests.to_megatron import assert_same_shards, expected_shards, make_hf, read_shards
from tests.warm import Process

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """What ranks are forked from takes longer to start than they wait here for each other."""
    for seed in (0, 1):
        Process(["-c", "pass"], os.environ, seed=seed).finish()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    make_hf(tmp_path / "hf")
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    alice = {"name": "alice", "orgs": [{"name": "org"}]}
    with serving(Hub({"org/model": Repository(files)}, {"hf_of_alice": alice})) as hub:
        yield hub


def run(hub: Hub, place: Path, *arguments: str, **more: str) -> Run:
    """Run `dist_convert` on two ranks that wait two seconds for each other."""
    env = hub.environment(place / "home", PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1", **more)
    return run_ranks(2, *arguments, "--device", "cpu", "--timeout", "2", env=env)


def fetch(hub: Hub, place: Path) -> Run:
    paths = ["--load-dir", "org/model", "--save-dir", str(place / "megatron")]
    return run(hub, place, "hf-to-megatron", *paths, "--make-vocab-size-divisible-by", "4")


def upload(hub: Hub, place: Path) -> Run:
    make(place / "in", Model(), Grid(tp=2))
    paths = ["--load-path", str(place / "in"), "--save-path", str(place / "out")]
    return run(hub, place, "megatron-to-hf", *paths, "--push-to-hub", "org/new", "--keep-paths", HF_TOKEN="hf_of_alice")


def test_one_rank_fetches_for_longer_than_the_timeout_while_the_other_waits(hub: Hub, tmp_path: Path) -> None:
    hub.delays_seconds[WEIGHTS] = 4
    done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_shards(read_shards(tmp_path / "megatron"), expected_shards(Model(), make_hf(tmp_path / "again")))
    assert hub.downloaded().count(WEIGHTS) == 1


def test_a_fetch_that_fails_ends_the_ranks_that_wait_for_it(hub: Hub, tmp_path: Path) -> None:
    hub.faults[("GET", f"/org/model/resolve/{hub.repositories['org/model'].commit}/{WEIGHTS}")] = 403
    done = fetch(hub, tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("the model cannot be fetched, and the cache does not hold all of it") == 1
    assert "lost contact" not in done.stderr


def test_rank_0_uploads_for_longer_than_the_timeout_when_the_other_has_left(hub: Hub, tmp_path: Path) -> None:
    hub.delays_seconds["batch"] = 4
    done = upload(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.repositories["org/new"].files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert [path for _, path, _ in hub.requests].count("/api/whoami-v2") == 1


def test_an_upload_that_breaks_off_is_said_once_and_the_model_stays(hub: Hub, tmp_path: Path) -> None:
    hub.faults[("POST", "/org/new.git/info/lfs/objects/batch")] = 403
    done = upload(hub, tmp_path)
    assert done.returncode != 0
    assert done.stderr.count(f"no permission to write to org/new; the model in {tmp_path}/out is complete") == 1
    assert (tmp_path / "out" / "config.json").is_file()


def test_what_forbids_an_upload_is_said_once_by_all_ranks_before_the_conversion(hub: Hub, tmp_path: Path) -> None:
    hub.users.clear()
    done = upload(hub, tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("the hub does not accept the token") == 1
    assert not list(tmp_path.glob("out*"))
