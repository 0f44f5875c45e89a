"""Disks that are full, and disks that others fill meanwhile: real ones, with fallocate(2) and without."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_convert.write.files import held, reserve_file
from tests.distributed.interrupting import Run, Runs
from tests.faults.conftest import (
    DIRECTIONS,
    TARGET_FILES,
    Undisturbed,
    assert_goes_on,
    assert_one_clear_error,
    command,
    has_mark,
    target_below,
)
from tests.faults.disks import FaultyDisk
from tests.file_systems import make_ext4, mounted, remount

both_directions = pytest.mark.parametrize("direction", DIRECTIONS)
NO_SPACE = "No space left on device"


@pytest.fixture
def small_disk(make_disk: Callable[[str], Path]) -> Path:
    """A file system of its own in memory, of 64 KiB."""
    return make_disk("size=64k")


@pytest.fixture
def ext4_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of its own, of 4 MiB."""
    disk = tmp_path / "ext4"
    disk.mkdir()
    make_ext4(tmp_path / "image", 4 << 20)
    with mounted("-o", "loop", str(tmp_path / "image"), str(disk)):
        yield disk


def free_bytes(disk: Path) -> int:
    space = os.statvfs(disk)
    return space.f_bavail * space.f_frsize


def leave(disk: Path, left_bytes: int) -> Path:
    """Fill a disk but for so many bytes; returns what fills it."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free_bytes(disk) - left_bytes)
    return filler


def assert_says_how_to_go_on(failed: Run, target: Path) -> None:
    """One clear error, which does not send a job script round and round where nothing was written."""
    assert_one_clear_error(failed, target)
    assert NO_SPACE in failed.printed
    assert failed.printed.count("\n  resume:") == 1, failed.printed
    assert failed.written_bytes > 0 or not has_mark(target)


@both_directions
def test_a_disk_that_is_too_small_is_told_before_anything_is_made(
    direction: str, small_disk: Path, runs: Runs, undisturbed: Undisturbed
) -> None:
    target = target_below(direction, small_disk / "target")
    words = command(direction, undisturbed.sources[direction], target)
    failed = runs.do(words)
    assert_one_clear_error(failed, target)
    assert "not enough free space for the target" in failed.printed
    assert list(small_disk.iterdir()) == []
    remount("remount,size=4M", str(small_disk))
    assert_goes_on(runs.do(words), direction, target, undisturbed)


@both_directions
@pytest.mark.parametrize("ranks", [1, 2])
def test_space_that_cannot_be_reserved_is_told_before_any_value_is_written(
    direction: str, ranks: int, small_disk: Path, runs: Runs, undisturbed: Undisturbed
) -> None:
    target = target_below(direction, small_disk / "target")
    words = command(direction, undisturbed.sources[direction], target)
    pages = -(-undisturbed.file_bytes[direction] // 4096) + 2  # enough for the weights files, not for the journal too
    remount(f"remount,size={4 * pages}k", str(small_disk))
    failed = runs.do(words, ranks=ranks)
    assert_says_how_to_go_on(failed, target)
    assert Path(TARGET_FILES[direction]).name in failed.printed
    assert failed.written_bytes == 0
    remount("remount,size=4M", str(small_disk))
    assert_goes_on(runs.do(words, ranks=ranks), direction, target, undisturbed)


@both_directions
def test_ext4_that_cannot_reserve_all_of_the_space_keeps_a_part_of_it_and_the_same_command_goes_on(
    direction: str, ext4_disk: Path, runs: Runs, undisturbed: Undisturbed
) -> None:
    target = target_below(direction, ext4_disk / "target")
    words = command(direction, undisturbed.sources[direction], target)
    filler = leave(ext4_disk, undisturbed.file_bytes[direction] + 2048)  # not enough for the journal too
    failed = runs.do(words)
    assert_says_how_to_go_on(failed, target)
    assert failed.written_bytes == 0
    filler.unlink()
    assert_goes_on(runs.do(words), direction, target, undisturbed)


@pytest.mark.parametrize("refuses", [False, True])
def test_space_is_reserved_by_fallocate_and_where_that_is_refused_by_nothing(
    refuses: bool, tmp_path: Path, disk: FaultyDisk
) -> None:
    path = (disk.behind if refuses else tmp_path) / "reserved"
    path.write_bytes(b"values")
    os.truncate(path, 1 << 20)
    before = path.stat().st_blocks
    root = disk.path if refuses else path.parent
    with held(root) as directory:
        assert reserve_file(directory, "reserved") is not refuses
    assert (path.stat().st_blocks * 512 >= 1 << 20) is not refuses
    assert path.read_bytes() == b"values" + bytes((1 << 20) - 6)
    assert not refuses or path.stat().st_blocks == before
    path.unlink()


@pytest.fixture
def disk_without_fallocate(tmp_path: Path, disk: FaultyDisk) -> Iterator[Path]:
    """An ext4 file system of 4 MiB behind one that does not know fallocate(2); below `disk.path` and `disk.behind`."""
    behind = disk.behind / tmp_path.name
    behind.mkdir()
    make_ext4(tmp_path / "image", 4 << 20)
    with mounted("-o", "loop", str(tmp_path / "image"), str(behind)):
        yield behind
    disk.heal()
    behind.rmdir()


@both_directions
def test_where_space_cannot_be_reserved_a_disk_that_is_too_small_is_told_before_anything_is_made(
    direction: str, disk_without_fallocate: Path, disk: FaultyDisk, runs: Runs, undisturbed: Undisturbed
) -> None:
    target = target_below(direction, disk.path / disk_without_fallocate.name / "target")
    words = command(direction, undisturbed.sources[direction], target)
    filler = leave(disk_without_fallocate, 20_000)
    failed = runs.do(words)
    assert_one_clear_error(failed, target)
    assert "not enough free space for the target" in failed.printed
    assert not (disk_without_fallocate / "target").exists()
    filler.unlink()
    assert_goes_on(runs.do(words), direction, target, undisturbed)


@both_directions
@pytest.mark.parametrize("ranks", [1, 2])
def test_where_space_cannot_be_reserved_and_others_take_it_the_error_is_one_and_the_same_command_goes_on(
    direction: str, ranks: int, disk_without_fallocate: Path, disk: FaultyDisk, runs: Runs, undisturbed: Undisturbed
) -> None:
    name = disk_without_fallocate.name
    target = target_below(direction, disk.path / name / "target")
    words = command(direction, undisturbed.sources[direction], target)
    half_bytes = undisturbed.written_bytes[direction] // (2 if direction == "megatron-to-hf" else 4)  # of one of two
    disk.fail("write", TARGET_FILES[direction], "fill", at=half_bytes, changed=f"/{name}/filler")
    failed = runs.do(words, ranks=ranks)
    disk.heal()
    assert free_bytes(disk_without_fallocate) < 4096
    assert_says_how_to_go_on(failed, target)
    assert_one_clear_error(runs.do(words, ranks=ranks), target)  # while it is full
    (disk_without_fallocate / "filler").unlink()
    assert_goes_on(runs.do(words, ranks=ranks), direction, target, undisturbed)
