"""Which tests run only when they are asked for, what those for GPUs ran on, and what several folders start from."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dist_convert.write.files import Directory, held
from tests.distributed.devices import describe_gpus
from tests.distributed.interrupting import Runs, interrupted_runs
from tests.file_systems import mounted

#: Folders and files that take a minute or more each; `launch/test.sh -m ""` runs them too.
SLOW = (
    "tests/faults/", "tests/launch/test_slurm.py", "tests/oracle/peers/test_peers.py",
    "tests/oracle/test_other_versions.py", "tests/oracle/test_torchtitan.py", "tests/test_jobs.py",
)  # fmt: skip


def pytest_configure() -> None:
    """Have the programs that tests start heed Ctrl-C, though a shell has the tests in the background ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


#: Files that take longest, in that order: whoever is done with one of them still has small ones to do.
LONGEST = (
    "tests/distributed/test_stopping.py", "tests/distributed/test_local_ranks.py", "tests/oracle/test_real_model.py",
    "tests/oracle/test_megatron_loads.py", "tests/plan/test_scale.py", "tests/distributed/test_to_megatron.py",
    "tests/distributed/test_resume.py", "tests/distributed/test_killed_nodes.py", "tests/distributed/test_hosts.py",
    "tests/oracle/test_logits.py", "tests/distributed/test_same_bytes.py", "tests/distributed/test_lost_ranks.py",
    "tests/distributed/test_own_shards.py", "tests/distributed/test_hub.py", "tests/write/test_hub.py",
    "tests/tokenizer/test_huggingface_directory.py", "tests/distributed/test_save_per_node.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files, and begin with the files that take longest."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    place_of = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place_of.get(item.nodeid.partition("::")[0], len(LONGEST)))


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    """Ranks that are quick to start, and that can be stopped at any moment."""
    with interrupted_runs() as started:
        yield started


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Directory]:
    """The test's own directory, held open."""
    with held(tmp_path) as directory:
        yield directory


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts an empty file system in memory, with options such as "size=16k", until the test ends."""
    with ExitStack() as stack:

        def make(options: str) -> Path:
            point = tmp_path / "disk"
            point.mkdir()
            stack.enter_context(mounted("-t", "tmpfs", "-o", options, "dist-convert-test", str(point)))
            return point

        yield make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """After `pytest -m gpu`, say what ran, and on what; the reasons of what was skipped stand above."""
    if config.getoption("markexpr") != "gpu":
        return
    terminalreporter.section(describe_gpus())
    for report in terminalreporter.stats.get("passed", []):
        terminalreporter.line(report.nodeid)
