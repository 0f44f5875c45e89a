"""Sources that cannot be read, or change while they are: one clear error, and the same command goes on from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.interrupting import Run, Runs
from tests.faults.conftest import (
    DIRECTIONS,
    SOURCE_FILES,
    Undisturbed,
    assert_goes_on,
    assert_one_clear_error,
    command,
    has_mark,
    target_below,
)
from tests.faults.disks import FaultyDisk

both_directions = pytest.mark.parametrize("direction", DIRECTIONS)


class Conversion:
    """Starts one conversion again and again: its source on the disk that fails, its target elsewhere."""

    def __init__(self, runs: Runs, direction: str, undisturbed: Undisturbed, root: Path) -> None:
        self.source = undisturbed.sources[direction]
        self.file = next(self.source.rglob(SOURCE_FILES[direction]))
        self.middle_bytes = self.file.stat().st_size // 2
        self.target = target_below(direction, root / "target")
        self._runs = runs
        self._words = command(direction, self.source, self.target)

    def run(self, **how: object) -> Run:
        return self._runs.do(self._words, **how)


@pytest.fixture
def conversion(direction: str, runs: Runs, undisturbed_on_disk: Undisturbed, tmp_path: Path) -> Conversion:
    return Conversion(runs, direction, undisturbed_on_disk, tmp_path)


@both_directions
@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("EIO", "Input/output error"),
        ("ESTALE", "Stale file handle"),
        ("up to", "the file ends inside a tensor"),
    ],
)
def test_bytes_that_cannot_be_read_are_named_and_the_same_command_goes_on(
    direction: str, answer: str, shown: str, conversion: Conversion, disk: FaultyDisk, undisturbed_on_disk: Undisturbed
) -> None:
    disk.fail("read", SOURCE_FILES[direction], answer, at=conversion.middle_bytes)
    failed = conversion.run()
    assert_one_clear_error(failed, conversion.target)
    for part in (shown, SOURCE_FILES[direction], "\n  tensor:", "\n  expected:", "\n  resume:"):
        assert part in failed.printed
    disk.heal()
    again = conversion.run()
    assert_goes_on(again, direction, conversion.target, undisturbed_on_disk)
    assert failed.written_bytes > 0
    assert failed.written_bytes + again.written_bytes < 1.2 * undisturbed_on_disk.written_bytes[direction]


@both_directions
def test_job_scripts_start_again_after_a_fault_that_may_pass_until_that_brings_nothing_more(
    direction: str, conversion: Conversion, disk: FaultyDisk, undisturbed_on_disk: Undisturbed
) -> None:
    disk.fail("read", SOURCE_FILES[direction], "EIO", at=conversion.middle_bytes)
    first = conversion.run()
    assert has_mark(conversion.target)
    second = conversion.run()
    assert not has_mark(conversion.target)
    assert first.written_bytes > second.written_bytes
    for failed in (first, second):
        assert_one_clear_error(failed, conversion.target)
        assert failed.printed.count("\n  resume:") == 1
    disk.heal()
    assert_goes_on(conversion.run(), direction, conversion.target, undisturbed_on_disk)


@both_directions
@pytest.mark.parametrize("answer", ["up to", "rewrite"])
def test_job_scripts_do_not_start_again_where_the_source_is_short_or_has_changed(
    direction: str, answer: str, conversion: Conversion, disk: FaultyDisk, undisturbed: Undisturbed
) -> None:
    disk.fail("read", SOURCE_FILES[direction], answer, at=conversion.middle_bytes)
    failed = conversion.run()
    disk.heal()
    shutil.copy2(next(undisturbed.sources[direction].rglob(SOURCE_FILES[direction])), conversion.file)
    assert failed.written_bytes > 0
    assert not has_mark(conversion.target)


@both_directions
def test_a_read_that_brings_a_part_of_the_bytes_is_continued(
    direction: str, conversion: Conversion, disk: FaultyDisk, undisturbed_on_disk: Undisturbed
) -> None:
    disk.fail("read", SOURCE_FILES[direction], "half", at=conversion.middle_bytes)
    assert_goes_on(conversion.run(), direction, conversion.target, undisturbed_on_disk)


@pytest.mark.parametrize("call", ["open", "read"])
@pytest.mark.parametrize("answer", ["EIO", "ESTALE"])
@pytest.mark.parametrize(
    ("direction", "file"),
    [
        ("megatron-to-hf", SOURCE_FILES["megatron-to-hf"]),
        ("megatron-to-hf", "latest_checkpointed_iteration.txt"),
        ("hf-to-megatron", SOURCE_FILES["hf-to-megatron"]),
        ("hf-to-megatron", "config.json"),
    ],
)
def test_a_header_that_cannot_be_read_is_named_before_anything_is_made(
    direction: str, file: str, answer: str, call: str, conversion: Conversion, disk: FaultyDisk
) -> None:
    at_the_end = call == "read" and file.endswith(".pt")  # where a zip file has its directory
    disk.fail(call, file, answer, at=conversion.file.stat().st_size - 1 if at_the_end else 0)
    failed = conversion.run()
    assert_one_clear_error(failed, conversion.target)
    assert "cannot read the source" in failed.printed
    assert file in failed.printed
    assert not conversion.target.parent.exists()


@both_directions
@pytest.mark.parametrize("change", ["replace", "rewrite", "cut"])
def test_a_file_that_changes_while_it_is_read_is_noticed_and_none_of_its_bytes_count(
    direction: str, change: str, conversion: Conversion, disk: FaultyDisk, undisturbed_on_disk: Undisturbed,
    undisturbed: Undisturbed,
) -> None:  # fmt: skip
    disk.fail("read", SOURCE_FILES[direction], change, at=conversion.middle_bytes)
    failed = conversion.run()
    disk.heal()
    refused = conversion.run()
    shutil.copy2(next(undisturbed.sources[direction].rglob(SOURCE_FILES[direction])), conversion.file)
    assert_one_clear_error(failed, conversion.target)
    assert "a source file has changed while it was read" in failed.printed
    assert SOURCE_FILES[direction] in failed.printed
    assert_one_clear_error(refused, conversion.target)
    assert_goes_on(conversion.run(), direction, conversion.target, undisturbed_on_disk)


@pytest.mark.parametrize("direction", ["megatron-to-hf"])
def test_a_change_after_the_last_byte_was_read_is_noticed_and_nothing_counts_that_was_written(
    direction: str, disk: FaultyDisk, runs: Runs, undisturbed_on_disk: Undisturbed, undisturbed: Undisturbed
) -> None:
    source, target = undisturbed_on_disk.sources[direction], disk.path / "late" / "hf"
    file = next(source.rglob(SOURCE_FILES[direction]))
    disk.fail("write", "hf.partial/config.json", "rewrite", changed=f"/{file.relative_to(disk.path)}")
    failed = runs.do(command(direction, source, target))
    disk.heal()
    shutil.copy2(next(undisturbed.sources[direction].rglob(SOURCE_FILES[direction])), file)
    assert_one_clear_error(failed, target)
    again = runs.do(command(direction, source, target))
    assert "a source file has changed while it was read" in failed.printed
    assert failed.written_bytes == again.written_bytes == undisturbed_on_disk.written_bytes[direction]
    assert_goes_on(again, direction, target, undisturbed_on_disk)
