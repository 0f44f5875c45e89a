"""Disks that fail one of several ranks: all of them end, with one message, and the same command goes on."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.distributed.interrupting import Runs, hashes_below
from tests.distributed.launching import run_ranks
from tests.faults.conftest import (
    DIRECTIONS,
    SOURCE_FILES,
    TARGET_FILES,
    Undisturbed,
    assert_goes_on,
    assert_one_clear_error,
    command,
    target_below,
)
from tests.faults.disks import FaultyDisk

both_directions = pytest.mark.parametrize("direction", DIRECTIONS)
both_placements = pytest.mark.parametrize("placement", ["direct", "gather"])


@both_directions
@both_placements
def test_bytes_that_one_of_two_ranks_cannot_read_end_both(
    direction: str, placement: str, disk: FaultyDisk, runs: Runs, undisturbed_on_disk: Undisturbed, tmp_path: Path
) -> None:
    target = target_below(direction, tmp_path / "target")
    words = command(direction, undisturbed_on_disk.sources[direction], target, "--placement", placement)
    file = next(undisturbed_on_disk.sources[direction].rglob(SOURCE_FILES[direction]))
    disk.fail("read", SOURCE_FILES[direction], "EIO", at=file.stat().st_size // 2)
    failed = runs.do(words, ranks=2)
    assert_one_clear_error(failed, target)
    assert "Input/output error" in failed.printed
    disk.heal()
    assert_goes_on(runs.do(words, ranks=2), direction, target, undisturbed_on_disk)


def test_nothing_counts_that_any_rank_has_written_when_one_of_two_finds_its_source_changed(
    disk: FaultyDisk, runs: Runs, undisturbed_on_disk: Undisturbed, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    direction = "megatron-to-hf"
    target = target_below(direction, tmp_path / "target")
    words = command(direction, undisturbed_on_disk.sources[direction], target, "--placement", "gather")
    file = next(undisturbed_on_disk.sources[direction].rglob(SOURCE_FILES[direction]))
    disk.fail("read", SOURCE_FILES[direction], "rewrite", at=file.stat().st_size // 2)  # which only rank 1 reads
    failed = runs.do(words, ranks=2)
    disk.heal()
    shutil.copy2(next(undisturbed.sources[direction].rglob(SOURCE_FILES[direction])), file)
    assert_one_clear_error(failed, target)
    assert "a source file has changed while it was read" in failed.printed
    again = runs.do(words, ranks=2)
    assert failed.written_bytes > 0
    assert again.written_bytes == undisturbed_on_disk.written_bytes[direction]
    assert_goes_on(again, direction, target, undisturbed_on_disk)


@both_directions
def test_a_disk_that_fills_up_for_one_of_two_ranks_ends_both(
    direction: str, disk: FaultyDisk, runs: Runs, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    target = target_below(direction, disk.path / tmp_path.name / "target")
    words = command(direction, undisturbed.sources[direction], target)
    disk.fail("write", TARGET_FILES[direction], "ENOSPC", at=undisturbed.file_bytes[direction] // 3)
    failed = runs.do(words, ranks=2)
    assert_one_clear_error(failed, target)
    assert "No space left on device" in failed.printed
    disk.heal()
    assert_goes_on(runs.do(words, ranks=2), direction, target, undisturbed)
    shutil.rmtree(disk.behind / tmp_path.name)


def test_a_disk_that_does_not_answer_one_of_two_ranks_is_told_with_the_rank_and_its_step(
    disk: FaultyDisk, runs: Runs, undisturbed_on_disk: Undisturbed, tmp_path: Path
) -> None:
    direction = "megatron-to-hf"
    target = target_below(direction, tmp_path / "target")
    words = command(direction, undisturbed_on_disk.sources[direction], target, "--placement", "gather")
    file = next(undisturbed_on_disk.sources[direction].rglob(SOURCE_FILES[direction]))
    disk.fail("read", SOURCE_FILES[direction], "hang", at=file.stat().st_size // 2)
    failed = runs.do([*words, "--timeout", "5"], ranks=2)
    assert not target.exists()
    assert set(failed.exit_codes) <= {1, 143, -9}, failed
    assert "Traceback" not in failed.printed
    assert re.search(r"rank [01] on \S+, last heard of while (moving|reading) step \d", failed.printed)
    disk.heal()
    assert_goes_on(runs.do(words, ranks=2), direction, target, undisturbed_on_disk)


@pytest.mark.parametrize("fault", ["source", "target"])
def test_under_a_launcher_it_is_the_same(
    fault: str, disk: FaultyDisk, undisturbed_on_disk: Undisturbed, tmp_path: Path
) -> None:
    direction = "hf-to-megatron"
    target = target_below(direction, disk.path / tmp_path.name / "target")
    words = command(direction, undisturbed_on_disk.sources[direction], target)
    if fault == "source":
        disk.fail("read", SOURCE_FILES[direction], "ESTALE", at=undisturbed_on_disk.written_bytes[direction] // 2)
    else:
        disk.fail("fsync", TARGET_FILES[direction], "EIO")
    failed = run_ranks(2, *words)
    assert failed.returncode == 1
    assert failed.stderr.count("\n  found:") == 1
    assert failed.stderr.count("\n  resume:") == 1
    assert not target.exists()
    disk.heal()
    assert run_ranks(2, *words).returncode == 0
    assert hashes_below(target) == undisturbed_on_disk.targets[direction]
    shutil.rmtree(disk.behind / tmp_path.name)
