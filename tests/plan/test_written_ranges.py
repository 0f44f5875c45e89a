"""What earlier runs have written, joined from windows in any order: a window is done only if every byte of it is."""

from __future__ import annotations

import pytest

from dist_convert.plan.plan import NOTHING_WRITTEN, WrittenRanges
from dist_convert.records import Window

FILE = "model.safetensors"
#: Three stretches of 10 bytes, each 40 bytes after the one before.
GAPPED = Window(FILE, 100, 10, 40, 3)


def windows(*stretches: tuple[int, int]) -> list[Window]:
    """Windows without gaps, of one file, from their first byte and the byte after their last."""
    return [Window(FILE, start, end - start) for start, end in stretches]


JOINED: dict[str, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {
    "one": ([(8, 16)], [(8, 16)]),
    "that touch": ([(0, 8), (8, 16)], [(0, 16)]),
    "with one byte between them": ([(0, 8), (9, 16)], [(0, 8), (9, 16)]),
    "in any order": ([(24, 32), (0, 8), (16, 24), (8, 16)], [(0, 32)]),
    "as often as they come": ([(0, 8), (0, 8), (0, 8)], [(0, 8)]),
    "that overlap": ([(0, 8), (4, 12)], [(0, 12)]),
    "inside another": ([(0, 100), (10, 20), (100, 101)], [(0, 101)]),
}


@pytest.mark.parametrize("name", JOINED)
def test_windows_are_joined_to_as_few_stretches_as_they_fill(name: str) -> None:
    written, stretches = JOINED[name]
    written = WrittenRanges.of(windows(*written))
    assert written.stretches == {FILE: stretches}


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [([], 0), ([(0, 8), (4, 12)], 12), ([(0, 8), (0, 8), (9, 10)], 9)],
)
def test_bytes_that_were_written_twice_count_once(written: list[tuple[int, int]], size_bytes: int) -> None:
    assert WrittenRanges.of(windows(*written)).size_bytes == size_bytes


def test_gapped_windows_count_the_bytes_of_their_runs() -> None:
    assert WrittenRanges.of([GAPPED, GAPPED, Window(FILE, 0, 5)]).size_bytes == 35


@pytest.mark.parametrize(
    ("stretch", "is_done"),
    [
        ((10, 20), True), ((10, 11), True), ((19, 20), True), ((12, 18), True), ((30, 40), True),
        ((9, 20), False), ((10, 21), False), ((20, 21), False), ((10, 40), False), ((25, 26), False),
        ((0, 5), False), ((40, 41), False), ((39, 40), True),
    ],
)  # fmt: skip
def test_a_window_is_done_where_one_stretch_holds_all_of_it(stretch: tuple[int, int], is_done: bool) -> None:
    written = WrittenRanges.of(windows((30, 40), (10, 20)))
    assert written.covers(windows(stretch)[0]) is is_done


def test_a_window_across_what_two_runs_wrote_is_done() -> None:
    assert WrittenRanges.of(windows((0, 10), (10, 20))).covers(Window(FILE, 5, 10))


def test_the_same_bytes_of_another_file_are_not_done() -> None:
    assert not WrittenRanges.of(windows((0, 100))).covers(Window("model-00002-of-00002.safetensors", 0, 10))


def test_a_window_with_gaps_is_done_if_it_was_written_as_it_is() -> None:
    assert WrittenRanges.of([GAPPED]).covers(GAPPED)


@pytest.mark.parametrize(
    "other",
    [Window(FILE, 100, 10, 40, 2), Window(FILE, 140, 10, 40, 2), Window(FILE, 100, 10, 41, 3), Window(FILE, 100, 10)],
    ids=["fewer runs", "the later runs", "another stride", "its first run alone"],
)
def test_any_other_part_of_a_window_with_gaps_is_written_again(other: Window) -> None:
    assert not WrittenRanges.of([GAPPED]).covers(other)


def test_a_window_with_gaps_is_written_again_where_its_bytes_were_written_without() -> None:
    assert not WrittenRanges.of(windows((0, 1000))).covers(GAPPED)


def test_nothing_is_done_at_first() -> None:
    assert not NOTHING_WRITTEN.covers(Window(FILE, 0, 1))
    assert NOTHING_WRITTEN.size_bytes == 0
