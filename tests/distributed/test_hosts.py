"""Hosts with a network and a disk each: what every host has of a checkpoint is enough, and all end when one is lost."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model, make
from tests.converting import assert_same, read_tensors
from tests.distributed.hosts import Hosts, hosts, why_not
from tests.distributed.launching import Run, flags

ITERATION = "iter_0000004"

#: About 25 MB in blocks of 4 MiB, so that most of it is still to be moved after the first step was written.
MODEL = Model(hidden=512, ffn=4096, heads=8, groups=4, head_dim=64, layers=2)

#: That ranks wait for a silent one, and that a run may take beyond it to begin and to end.
TIMEOUT_SECONDS, PATIENCE_SECONDS = 6, 60


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Two hosts, the first with the shard of tensor rank 0 on its disk, the second with that of tensor rank 1."""
    if reason := why_not():
        pytest.skip(reason)
    with hosts(tmp_path, 2) as found:
        make(tmp_path / "whole", MODEL, Grid(tp=2))
        for number in (0, 1):
            (found.disk(number) / ITERATION).mkdir()
            shard = f"mp_rank_0{number}"
            (tmp_path / "whole" / ITERATION / shard).rename(found.disk(number) / ITERATION / shard)
        yield found


def job(found: Hosts, *more: str) -> list[str]:
    small_steps = ("--max-memory-per-rank", "72MB", "--timeout", str(TIMEOUT_SECONDS))
    return flags(found.local, found.root / "hf", "--ckpt-dir-name", ITERATION, *small_steps, *more)


def lose(found: Hosts, fault: str) -> list[Run]:
    """Convert, while the rank of the second host meets a fault; all must end in time and leave no target."""
    started = time.monotonic()
    runs = found.torchrun("1", fault, *job(found), module="tests.distributed.programs.faulty_rank")
    assert time.monotonic() - started < TIMEOUT_SECONDS + PATIENCE_SECONDS
    assert all(run.returncode for run in runs)
    assert not (found.root / "hf").exists()
    return runs


def test_hosts_with_a_shard_each_convert_to_a_disk_that_they_share(two_hosts: Hosts) -> None:
    runs = two_hosts.torchrun(*job(two_hosts))
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    expected = make(two_hosts.root / "again", MODEL, Grid(tp=2))
    assert_same(read_tensors(two_hosts.root / "hf"), expected)


def test_a_shard_that_is_on_no_host_is_named(two_hosts: Hosts) -> None:
    (two_hosts.disk(1) / ITERATION / "mp_rank_01").rename(two_hosts.root / "elsewhere")
    runs = two_hosts.torchrun(*job(two_hosts))
    assert all(run.returncode for run in runs)
    printed = "".join(run.stderr for run in runs)
    assert printed.count("1 rank directories of TP2 PP1 VPP1 EP1 ETP2 are missing") == 1
    assert "mp_rank_01" in printed
    assert not (two_hosts.root / "hf").exists()


def test_the_others_end_when_a_host_loses_its_rank(two_hosts: Hosts) -> None:
    first, second = lose(two_hosts, "kill")
    assert "exitcode  : -9" in second.stderr
    assert "lost contact with another rank" in first.stderr


def test_all_end_when_a_host_loses_its_network(two_hosts: Hosts) -> None:
    for run in lose(two_hosts, "run:ip link set eth0 down"):
        # Whichever is noticed first: a rank that is not heard of any more, or a connection that broke.
        said = re.findall(r"lost contact with another rank|rank [01] on \w+, last heard of while", run.stderr)
        assert len(said) == 1, run.stderr
