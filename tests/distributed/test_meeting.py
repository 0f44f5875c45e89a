"""Ranks that do not meet: `--timeout` and signals end the wait, and the error says who is missing and where to look."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator

import pytest

from tests.checkpoints import Model, make
from tests.distributed.launching import environment, flags, free_port
from tests.warm import Process


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("meeting")
    make(root / "megatron", Model())
    return flags(root / "megatron", root / "hf")


@pytest.fixture
def silent_port() -> Iterator[str]:
    """Where something accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield str(listening.getsockname()[1])


def rank_of(size: int, rank: int, job: list[str], *more: str, port: str, address: str = "127.0.0.1") -> Process:
    meeting = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": address, "MASTER_PORT": port}
    found = environment(RANK=str(rank), LOCAL_RANK=str(rank), **meeting)
    return Process(["-m", "dist_convert", *job, *more], found)


def test_ranks_that_have_come_name_the_one_that_has_not(job: list[str]) -> None:
    port = free_port()
    with (
        rank_of(3, 0, job, "--timeout", "2", port=port) as zero,
        rank_of(3, 2, job, "--timeout", "2", port=port) as two,
    ):
        runs = [zero.finish(20), two.finish(20)]
    assert [run.returncode for run in runs] == [1, 1]
    assert "".join(run.stderr for run in runs) == (
        "2 of 3 ranks have connected\n"
        "  expected: all of them within 2 s\n"
        "  found:    nothing from rank 1\n"
        "  remedy:   look at the log of the first of these: has it started, with the same MASTER_ADDR, MASTER_PORT and "
        "WORLD_SIZE? Allow more time with --timeout\n"
    )


@pytest.mark.parametrize(
    ("address", "is_silent", "reason"),
    [
        ("127.0.0.1", False, "Connection refused"),
        ("127.0.0.1", True, "something listens there that is not rank 0"),
        ("no-such-host.invalid", False, "Name or service not known"),
    ],
)
def test_a_rank_that_does_not_reach_rank_0_says_where_it_looked(
    address: str, is_silent: bool, reason: str, job: list[str], silent_port: str
) -> None:
    port = silent_port if is_silent else free_port()
    with rank_of(2, 1, job, "--timeout", "1", port=port, address=address) as rank:
        run = rank.finish(20)
    assert run.returncode == 1
    assert run.stderr == (
        "rank 1 of 2 does not reach rank 0\n"
        f"  expected: it listens at MASTER_ADDR={address}, MASTER_PORT={port}\n"
        f"  found:    {reason}, in 1 s\n"
        "  remedy:   check both on every node and whether rank 0 has started, or allow more time with --timeout\n"
    )


def test_rank_0_says_where_its_own_address_is_that_of_another_machine(job: list[str]) -> None:
    with rank_of(2, 0, job, "--timeout", "1", port=free_port(), address="no-such-host.invalid") as rank:
        run = rank.finish(20)
    assert run.returncode == 1
    assert run.stderr.startswith("rank 0 of 2 does not reach rank 0\n  expected: it listens at MASTER_ADDR=no-such-")


def test_a_port_that_is_taken_is_named(job: list[str], silent_port: str) -> None:
    with rank_of(2, 0, job, port=silent_port) as rank:
        run = rank.finish(20)
    assert run.returncode == 1
    assert run.stderr.startswith(
        f"the ranks cannot meet\n  expected: a free port of rank 0's machine: MASTER_PORT={silent_port}\n"
    )


@pytest.mark.parametrize(
    ("number", "waits_for"),
    [(signal.SIGTERM, "a rank"), (signal.SIGINT, "a rank"), (signal.SIGTERM, "rank 0"), (signal.SIGTERM, "an answer")],
)
def test_a_signal_ends_a_rank_that_waits_for_others_at_once(
    number: signal.Signals, waits_for: str, job: list[str], silent_port: str
) -> None:
    port = silent_port if waits_for == "an answer" else free_port()
    with rank_of(2, 0 if waits_for == "a rank" else 1, job, port=port) as rank:
        time.sleep(1.0)  # until it waits
        began = time.monotonic()
        rank.send_signal(number)
        run = rank.finish(20)
        took_seconds = time.monotonic() - began
    assert run.returncode == 128 + number
    assert run.stderr.startswith(f"stopped by {number.name}\n")
    assert took_seconds < 3
