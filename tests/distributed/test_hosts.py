"""Hosts with a network and a disk each: what every host has of a checkpoint is enough, and all end when one is lost."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checkpoints import Grid, Model, hf_tensors, make
from tests.converting import assert_same, convert, read_tensors
from tests.distributed.hosts import Hosts, hosts, why_not
from tests.distributed.launching import Run, flags, hashes

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
    small_steps = ("--max-memory-per-rank", "76MB", "--timeout", str(TIMEOUT_SECONDS))
    return flags(found.local, found.root / "hf", "--ckpt-dir-name", ITERATION, *small_steps, *more)


def lose(found: Hosts, fault: str, rank: int = 1, on_first_end: Callable[[], None] = lambda: None) -> list[Run]:
    """Convert, while a rank meets a fault; the others must end in time and leave no target."""
    started = time.monotonic()
    program = "tests.distributed.programs.faulty_rank"
    runs = found.torchrun(str(rank), fault, *job(found), module=program, on_first_end=on_first_end)
    assert time.monotonic() - started < TIMEOUT_SECONDS + PATIENCE_SECONDS
    assert all(run.returncode for run in runs)
    assert not (found.root / "hf").exists()
    return runs


def assert_resumes(found: Hosts) -> None:
    """The same command goes on where the lost one was, to the bytes of one that nothing happened to."""
    assert (found.root / "hf.partial" / "resumable").is_file()
    runs = found.torchrun(*job(found))
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    assert "are written already; resuming" in runs[0].stderr
    make(found.root / "again", MODEL, Grid(tp=2))
    undisturbed = ("--ckpt-dir-name", ITERATION, "--placement", "gather")
    assert convert(found.root / "again", found.root / "undisturbed" / "hf", *undisturbed) == 0
    made = hashes(found.root / "undisturbed" / "hf")
    differ = ("README.md", "conversion.json")  # which name the checkpoint's own directory
    assert {name: h for name, h in hashes(found.root / "hf").items() if name not in differ} == {
        name: h for name, h in made.items() if name not in differ
    }


def said_by_ranks(run: Run) -> str:
    """What comes before torchrun's own report, which ends with a rank's message once more."""
    return run.stderr.partition("Traceback (most recent call last)")[0]


@pytest.mark.slow
def test_hosts_with_a_shard_each_convert_to_a_disk_that_they_share(two_hosts: Hosts) -> None:
    runs = two_hosts.torchrun(*job(two_hosts))
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    expected = make(two_hosts.root / "again", MODEL, Grid(tp=2))
    assert_same(read_tensors(two_hosts.root / "hf"), expected)


@pytest.mark.slow
def test_a_shard_that_is_on_no_host_is_named(two_hosts: Hosts) -> None:
    (two_hosts.disk(1) / ITERATION / "mp_rank_01").rename(two_hosts.root / "elsewhere")
    runs = two_hosts.torchrun(*job(two_hosts))
    assert all(run.returncode for run in runs)
    printed = "".join(map(said_by_ranks, runs))
    assert printed.count("1 rank directory of TP2 PP1 VPP1 EP1 ETP2 missing") == 1
    assert "mp_rank_01" in printed
    assert not (two_hosts.root / "hf").exists()


@pytest.mark.slow
def test_different_shards_of_one_name_on_two_hosts_are_refused(two_hosts: Hosts) -> None:
    make(two_hosts.root / "other", MODEL, Grid(tp=2), seed=1)
    shard = f"{ITERATION}/mp_rank_00"
    (two_hosts.root / "other" / shard).rename(two_hosts.disk(1) / shard)
    runs = two_hosts.torchrun(*job(two_hosts))
    assert all(run.returncode for run in runs)
    printed = "".join(map(said_by_ranks, runs))
    assert printed.count("two ranks see different files under one name") == 1
    assert "mp_rank_00/model_optim_rng.pt" in printed
    assert "of other content on rank 1" in printed
    assert not (two_hosts.root / "hf").exists()


def test_each_host_keeps_its_files_and_all_of_them_in_one_directory_are_the_model(two_hosts: Hosts) -> None:
    runs = two_hosts.torchrun(
        *flags(two_hosts.local, two_hosts.local / "hf", "--ckpt-dir-name", ITERATION),
        *("--save-per-node", "--max-shard-size", "5MB"),
    )
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    for number in (0, 1):
        assert list((two_hosts.disk(number) / "hf").glob("model-*"))
        shutil.copytree(two_hosts.disk(number) / "hf", two_hosts.root / "merged", dirs_exist_ok=True)
    assert_same(read_tensors(two_hosts.root / "merged"), hf_tensors(MODEL))


def test_the_others_end_when_a_host_loses_its_rank(two_hosts: Hosts) -> None:
    runs = lose(two_hosts, "kill")
    assert "exitcode  : -9" in runs[1].stderr
    assert f"rank 1 on {two_hosts.names[1]}, last heard of while" in runs[0].stderr
    assert (two_hosts.root / "hf.partial" / "resumable").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_end_when_a_host_loses_its_rank_and_it_goes_on(rank: int, two_hosts: Hosts) -> None:
    runs = lose(two_hosts, "kill", rank)
    assert "exitcode  : -9" in runs[rank].stderr
    other = runs[1 - rank].stderr
    named = f"rank {rank} on {two_hosts.names[rank]}, last heard of while" in other
    # The first host's torchrun serves the store in which ranks tell of themselves, and ends with its rank.
    assert named or (rank == 0 and f"{two_hosts.names[0]}, where all ranks meet, does not answer" in other), other
    assert_resumes(two_hosts)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_end_when_a_rank_is_stopped_and_it_goes_on(rank: int, two_hosts: Hosts) -> None:
    # Whatever started the stopped rank waits for it for ever: that host is switched off when the other has ended.
    runs = lose(two_hosts, "stop", rank, lambda: two_hosts.end(rank))
    assert f"rank {rank} on {two_hosts.names[rank]}, last heard of while" in runs[1 - rank].stderr
    assert_resumes(two_hosts)


@pytest.mark.slow
def test_all_end_when_a_host_loses_its_network_and_it_goes_on(two_hosts: Hosts) -> None:
    for run in lose(two_hosts, "run:ip link set eth0 down"):
        # Whichever is noticed first: a rank that is not heard of any more, or a connection that broke.
        said = re.findall(r"lost contact with another rank|rank [01] on \w+, last heard of while", said_by_ranks(run))
        assert len(said) == 1, run.stderr
    two_hosts.connect(1)
    assert_resumes(two_hosts)
