"""Targets that cannot be written: one clear error, nothing under the final name, and the same command goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.interrupting import Runs
from tests.faults.conftest import (
    DIRECTIONS,
    TARGET_FILES,
    Undisturbed,
    assert_goes_on,
    assert_one_clear_error,
    command,
    target_below,
)
from tests.faults.disks import FaultyDisk
from tests.file_systems import mounted, remount

both_directions = pytest.mark.parametrize("direction", DIRECTIONS)
NO_SPACE, NO_DISK = "No space left on device", "Input/output error"
DAMAGED = {"ENOSPC": NO_SPACE, "EDQUOT": "Disk quota exceeded", "EIO": NO_DISK, "EROFS": "Read-only file system"}


@pytest.fixture
def target(direction: str, disk: FaultyDisk, tmp_path: Path) -> Iterator[Path]:
    """Where the target is to be, on the disk that fails."""
    yield target_below(direction, disk.path / tmp_path.name / "target")
    disk.heal()
    subprocess.run(["rm", "-rf", str(disk.behind / tmp_path.name)], check=True)


@both_directions
@pytest.mark.parametrize("answer", DAMAGED)
def test_a_disk_that_refuses_bytes_at_nine_tenths_is_named_and_the_same_command_goes_on(
    direction: str, answer: str, target: Path, disk: FaultyDisk, runs: Runs, undisturbed: Undisturbed
) -> None:
    whole_bytes = undisturbed.written_bytes[direction]
    at = whole_bytes * 9 // 10 if direction == "megatron-to-hf" else whole_bytes // 2 * 8 // 10  # of one of two files
    disk.fail("write", TARGET_FILES[direction], answer, at=at)
    failed = runs.do(command(direction, undisturbed.sources[direction], target))
    assert_one_clear_error(failed, target)
    for part in ("cannot write the target", DAMAGED[answer], TARGET_FILES[direction], "\n  resume:"):
        assert part in failed.printed
    disk.heal()
    again = runs.do(command(direction, undisturbed.sources[direction], target))
    assert_goes_on(again, direction, target, undisturbed)
    assert failed.written_bytes > whole_bytes // 3
    assert failed.written_bytes + again.written_bytes < 1.2 * whole_bytes


@both_directions
def test_a_write_that_takes_a_part_of_the_bytes_is_continued(
    direction: str, target: Path, disk: FaultyDisk, runs: Runs, undisturbed: Undisturbed
) -> None:
    disk.fail("write", TARGET_FILES[direction], "half", at=undisturbed.written_bytes[direction] // 3)
    run = runs.do(command(direction, undisturbed.sources[direction], target))
    assert_goes_on(run, direction, target, undisturbed)


PLACES = [
    ("megatron-to-hf", "open", ".journal/run-"), ("megatron-to-hf", "write", ".journal/run-"),
    ("megatron-to-hf", "write", ".journal/.dist_convert-"), ("megatron-to-hf", "write", ".journal/lock"),
    ("megatron-to-hf", "write", "resumable"), ("megatron-to-hf", "open", "hf.partial/model.safetensors"),
    ("megatron-to-hf", "write", "hf.partial/config.json"), ("megatron-to-hf", "write", "conversion.json"),
    ("megatron-to-hf", "fsync", "hf.partial/model.safetensors"), ("megatron-to-hf", "fsync", "hf.partial/config.json"),
    ("megatron-to-hf", "rename", "hf.partial"),
    ("hf-to-megatron", "write", ".journal/run-"), ("hf-to-megatron", "fsync", TARGET_FILES["hf-to-megatron"]),
    ("hf-to-megatron", "open", "partial/" + TARGET_FILES["hf-to-megatron"]),
    ("hf-to-megatron", "rename", "iter_0000001.partial"),
]  # fmt: skip


@pytest.mark.parametrize("answer", ["EIO", "ENOSPC"])
@pytest.mark.parametrize(("direction", "call", "file"), PLACES)
def test_whatever_the_disk_refuses_the_error_is_one_and_the_same_command_goes_on(
    direction: str, call: str, file: str, answer: str, target: Path, disk: FaultyDisk, runs: Runs,
    undisturbed: Undisturbed,
) -> None:  # fmt: skip
    disk.fail(call, file, answer)
    failed = runs.do(command(direction, undisturbed.sources[direction], target))
    assert_one_clear_error(failed, target)
    assert DAMAGED[answer] in failed.printed
    disk.heal()
    again = runs.do(command(direction, undisturbed.sources[direction], target))
    assert_goes_on(again, direction, target, undisturbed)


def test_the_tracker_file_that_cannot_be_written_still_names_the_iteration_before(
    disk: FaultyDisk, runs: Runs, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    direction, tracker = "hf-to-megatron", "latest_checkpointed_iteration.txt"
    target = target_below(direction, disk.path / "tracked" / "target")
    disk.fail("rename", tracker, "EIO")
    words = command(direction, undisturbed.sources[direction], target)
    failed = runs.do(words)
    assert failed.exit_codes == [1]
    assert failed.printed.count("\n  found:") == 1
    assert "Traceback" not in failed.printed
    assert not (target.parent / tracker).exists()
    disk.heal()
    assert_goes_on(runs.do(words), direction, target, undisturbed)
    assert (target.parent / tracker).read_text().strip() == "1"


@both_directions
def test_a_forced_write_that_failed_is_not_believed_the_next_time(
    direction: str, target: Path, disk: FaultyDisk, runs: Runs, undisturbed: Undisturbed
) -> None:
    disk.fail("fsync", TARGET_FILES[direction], "EIO")
    words = command(direction, undisturbed.sources[direction], target)
    failed = runs.do(words)
    assert_one_clear_error(failed, target)
    for file in disk.behind.rglob(f"*.partial/{TARGET_FILES[direction]}"):  # what the kernel has thrown away
        file.write_bytes(bytes(file.stat().st_size))
    disk.heal()
    assert_goes_on(runs.do(words), direction, target, undisturbed)


@both_directions
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_is_mounted_read_only_is_told_before_anything_is_made(
    direction: str, ranks: int, tmp_path: Path, runs: Runs, undisturbed: Undisturbed
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    target = target_below(direction, place / "target")
    words = command(direction, undisturbed.sources[direction], target)
    with mounted("--bind", str(place), str(place)):
        remount("remount,bind,ro", str(place))
        failed = runs.do(words, ranks=ranks)
        assert_one_clear_error(failed, target)
        assert str(target.parent) in failed.printed
        assert list(place.iterdir()) == []
        remount("remount,bind,rw", str(place))
        assert_goes_on(runs.do(words, ranks=ranks), direction, target, undisturbed)
