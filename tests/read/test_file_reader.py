"""Positioned reads: any strided window of a file arrives packed, cast and counted, as torch's as_strided sees it."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_convert.errors import CorruptFile, PlanError, SourceChanged, SourceError, UnsupportedModel
from dist_convert.read.file_reader import TORCH_DTYPES, FileReader, make_buffer
from dist_convert.read.source import changed_files, file_signature, usual_read_ahead
from dist_convert.records import DTYPE_BYTES, View

FILE = "mp_rank_00/model_optim_rng.pt"
NAME = "decoder.final_layernorm.weight"
START = 13 * 8
VALUES = torch.randn(6000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def reader(root: Path, scratch_bytes: int = 65536) -> FileReader:
    return FileReader(root, make_buffer(scratch_bytes))


def write(root: Path, values: torch.Tensor) -> None:
    (root / "mp_rank_00").mkdir(exist_ok=True)
    (root / FILE).write_bytes(b"\xa5" * START + values.view(torch.uint8).numpy().tobytes())


def view_of(rows: int, columns: int, row_stride: int, column_stride: int, dtype: str = "F32", first: int = 0) -> View:
    offset_bytes = START + first * TORCH_DTYPES[dtype].itemsize
    return View(FILE, NAME, dtype, offset_bytes, rows, columns, row_stride, column_stride)


def read(files: FileReader, view: View, dtype: str, add: int = 0, at: int = 0) -> torch.Tensor:
    """Read into a buffer full of garbage, check that nothing around the target changed, and return the matrix."""
    size_bytes = view.rows * view.columns * TORCH_DTYPES[dtype].itemsize
    buffer = make_buffer(at + size_bytes + 64)
    buffer.tensor.fill_(0x5A)
    files.read(view, dtype, add, buffer, at)
    around = torch.cat([buffer.tensor[:at], buffer.tensor[at + size_bytes :]])
    assert (around == 0x5A).all()
    packed = buffer.tensor[at : at + size_bytes].clone().view(TORCH_DTYPES[dtype])
    return packed.view(view.rows, view.columns)


def changed(files: FileReader, view: View, dtype: str, add: int = 0) -> dict[str, int]:
    """How many values a cast changed beyond rounding."""
    return dict(files.read(view, dtype, add, make_buffer(view.rows * view.columns * DTYPE_BYTES[dtype]), 0))


def expect(values: torch.Tensor, view: View, dtype: str, add: int = 0, first: int = 0) -> torch.Tensor:
    strided = values.as_strided((view.rows, view.columns), (view.row_stride, view.column_stride), first)
    return (strided.double() + add).to(TORCH_DTYPES[dtype])


WINDOWS = {
    "dense": (6, 10, 10, 1), "rows with gaps": (6, 10, 25, 1), "every third column": (6, 10, 30, 3),
    "every other row": (6, 10, 20, 1), "transposed": (6, 10, 1, 6), "transposed with gaps": (6, 10, 1, 50),
    "transposed steps": (6, 10, 3, 90), "one row": (1, 10, 10, 1), "one row of steps": (1, 10, 1, 7),
    "one row of far steps": (1, 10, 1, 500), "one row whose own stride is far": (1, 10, 5000, 7),
    "one column": (10, 1, 1, 1), "one column of far steps": (10, 1, 500, 1),
    "one column whose own stride is far": (10, 1, 3, 5000), "one element": (1, 1, 1, 1),
    "rows far apart": (3, 10, 2500, 1), "columns far apart": (10, 3, 1, 2500), "elements far apart": (3, 3, 2000, 600),
    "expanded rows": (6, 10, 0, 1), "expanded columns": (6, 10, 1, 0), "expanded rows of steps": (2, 10, 0, 100),
    "expanded columns of steps": (10, 2, 100, 0), "expanded element": (6, 10, 0, 0), "overlapping": (6, 10, 3, 1),
    "overlapping transposed": (6, 10, 1, 3),
}  # fmt: skip


@pytest.mark.parametrize(("stored", "target"), [("F32", "F32"), ("F32", "BF16"), ("BF16", "F32"), ("F64", "F16")])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_arrives_packed(window: str, stored: str, target: str, tmp_path: Path) -> None:
    values, view = VALUES.to(TORCH_DTYPES[stored]), view_of(*WINDOWS[window], dtype=stored)
    write(tmp_path, values)
    assert torch.equal(read(reader(tmp_path), view, target, at=64), expect(values, view, target))


@pytest.mark.parametrize("lines", [1, 1.5, 2, 4])
@pytest.mark.parametrize(
    ("window", "line_items"),
    [
        ("rows with gaps", 10), ("every third column", 28), ("rows far apart", 10), ("columns far apart", 10),
        ("transposed with gaps", 6), ("elements far apart", 1201),
    ],
)  # fmt: skip
def test_a_buffer_of_few_lines_gives_the_same_values(
    window: str, line_items: int, lines: float, tmp_path: Path
) -> None:
    values, view = VALUES.half(), view_of(*WINDOWS[window], dtype="F16")
    write(tmp_path, values)
    scratch_bytes = int(lines * line_items) * 2
    assert torch.equal(read(reader(tmp_path, scratch_bytes), view, "F32"), expect(values, view, "F32"))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 12), columns=st.integers(1, 12), row_stride=st.integers(0, 120),
    column_stride=st.integers(0, 120), first=st.integers(0, 40), scratch_items=st.integers(1400, 3000),
)  # fmt: skip
def test_any_strides_are_seen_as_torch_sees_them(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, row_stride: int, column_stride: int, first: int,
    scratch_items: int,
) -> None:  # fmt: skip
    root = tmp_path_factory.getbasetemp()
    write(root, VALUES.float())
    view = view_of(rows, columns, row_stride, column_stride, first=first)
    files = reader(root, scratch_items * 4)
    found = read(files, view, "F32")
    files.close()
    assert torch.equal(found, expect(VALUES.float(), view, "F32", first=first))


def test_elements_too_far_apart_for_the_buffer_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, VALUES.float())
    with pytest.raises(UnsupportedModel, match="too far apart") as caught:
        read(reader(tmp_path, 400), view_of(3, 3, 2000, 600), "F32")
    assert (caught.value.tensor, caught.value.file) == (NAME, str(tmp_path / FILE))


@pytest.mark.parametrize(("stored", "target"), [("F32", "F32"), ("BF16", "BF16"), ("F16", "BF16"), ("F32", "F16")])
@pytest.mark.parametrize("window", ["dense", "one column", "expanded rows", "transposed"])
def test_a_constant_is_added_before_the_cast(window: str, stored: str, target: str, tmp_path: Path) -> None:
    values, view = VALUES.to(TORCH_DTYPES[stored]), view_of(*WINDOWS[window], dtype=stored)
    write(tmp_path, values)
    files = reader(tmp_path)
    found = read(files, view, target, add=1)
    exact = values.as_strided(found.shape, (view.row_stride, view.column_stride)).double() + 1
    assert torch.equal(found, exact.to(TORCH_DTYPES[target]))
    rounded = int((found.double() != exact).sum())
    assert changed(files, view, target, add=1) == ({"rounded_norms": rounded} if rounded else {})


def test_finite_values_that_become_infinite_are_counted(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 65504.0, 65519.0, 65520.0, -1e6, float("inf"), float("-inf"), float("nan"), 3e38, 0.0])
    write(tmp_path, values)
    files = reader(tmp_path)
    assert changed(files, view_of(2, 5, 5, 1), "F16") == {"overflowed": 3}
    assert changed(files, view_of(5, 2, 1, 5), "BF16") == {}


def test_bytes_are_counted_once_for_each_value_read(tmp_path: Path) -> None:
    write(tmp_path, VALUES.float())
    files = reader(tmp_path)
    read(files, view_of(6, 10, 10, 1), "F32")
    assert files.read_bytes == 240
    read(files, view_of(6, 10, 1, 50), "BF16")
    assert files.read_bytes == 480


@pytest.mark.parametrize("window", ["dense", "rows far apart", "transposed"])
def test_a_file_that_ends_inside_a_tensor_is_named(window: str, tmp_path: Path) -> None:
    rows, columns, row_stride, column_stride = WINDOWS[window]
    span = 1 + (rows - 1) * row_stride + (columns - 1) * column_stride
    write(tmp_path, VALUES.float()[:span])
    os.truncate(tmp_path / FILE, START + span * 4 - 1)
    with pytest.raises(CorruptFile, match="ends inside a tensor") as caught:
        read(reader(tmp_path), view_of(*WINDOWS[window]), "F32")
    assert (caught.value.tensor, caught.value.file) == (NAME, str(tmp_path / FILE))


@pytest.mark.parametrize("dtype", ["F64", "F32"])
def test_values_that_do_not_fit_into_their_buffer_are_not_read(dtype: str, tmp_path: Path) -> None:
    write(tmp_path, VALUES)
    with pytest.raises(PlanError, match="the data read does not fit into its buffer") as caught:
        reader(tmp_path).read(view_of(2, 4, 4, 1, "F64"), dtype, 0, make_buffer(16), 0)
    assert (caught.value.tensor, caught.value.file) == (NAME, str(tmp_path / FILE))


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot read the source") as caught:
        read(reader(tmp_path), view_of(2, 2, 2, 1), "F32")
    assert (caught.value.tensor, caught.value.file) == (NAME, str(tmp_path / FILE))
    assert caught.value.found == "No such file or directory"


def test_a_pipe_that_has_come_in_a_files_place_keeps_nobody_waiting(tmp_path: Path) -> None:
    write(tmp_path, VALUES)
    known = {FILE: file_signature(tmp_path / FILE)}
    (tmp_path / FILE).unlink()
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(SourceChanged, match="a source file has changed while it was read") as caught:
        read(FileReader(tmp_path, make_buffer(65536), known), view_of(2, 2, 2, 1), "F32")
    assert (caught.value.tensor, caught.value.file) == (NAME, str(tmp_path / FILE))
    assert changed_files(tmp_path, known) == [FILE]


def test_hundreds_of_files_are_read_with_few_open_at_once(tmp_path: Path) -> None:
    files = reader(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for number in range(200):
        (tmp_path / f"{number}.pt").write_bytes(torch.tensor([float(number)]).numpy().tobytes())
    for number in [*range(200), *range(200)]:
        view = View(f"{number}.pt", NAME, "F32", 0, 1, 1, 1, 1)
        assert read(files, view, "F32").item() == number
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= 64
        files.close()
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux tells what its page cache has")
@pytest.mark.parametrize(("row_stride", "is_asked_for"), [(4096, True), (3 * 4096, False)], ids=["whole", "gaps"])
def test_the_system_is_asked_to_read_all_of_what_is_read_whole_soon_and_no_gaps(
    row_stride: int, is_asked_for: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / FILE.split("/")[1]
    make_uncached(path, 2 << 20)  # whether its beginning is cached is asked, which has some of it read
    advise, asked = os.posix_fadvise, list[tuple[int, int]]()

    def noting(descriptor: int, offset_bytes: int, size_bytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((offset_bytes, size_bytes))
        advise(descriptor, offset_bytes, size_bytes, advice)

    monkeypatch.setattr(os, "posix_fadvise", noting)
    files, view = reader(tmp_path), View(path.name, NAME, "F64", 1 << 20, 10, 4096, row_stride, 1)
    files.read_ahead(view)
    assert asked == ([(1048576, 131072), (1179648, 131072), (1310720, 65536)] if is_asked_for else [])
    if is_asked_for:
        deadline = time.monotonic() + 20
        while not is_cached(path, 1 << 20) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert is_cached(path, 1 << 20)
        asked.clear()
        files.read_ahead(view)
        assert asked == []


def test_a_disk_of_this_machine_is_not_asked_to_read_ahead_and_all_else_is(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc/self")
    assert usual_read_ahead(tmp_path / "link") == 8
    devices = [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    disks = [point for point in devices if point.is_dir() and os.major(point.stat().st_dev)]
    assert {usual_read_ahead(point) for point in disks} <= {0}


def is_cached(path: Path, offset_bytes: int) -> bool:
    """Whether the page cache has a byte of a file: reading it then takes no wait."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return bool(os.preadv(descriptor, [bytearray(1)], offset_bytes, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def make_uncached(path: Path, size_bytes: int) -> None:
    """Make a file that is on the disk alone: it is written past the page cache."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        with os.fdopen(descriptor, "wb", buffering=0) as file, mmap.mmap(-1, size_bytes) as zeros:
            file.write(zeros)
    except OSError as error:
        pytest.skip(f"this file system has no other place for a file than memory: {error}")
    if is_cached(path, 0):
        pytest.skip("this file system has no other place for a file than memory")


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux tells what its page cache has")
@pytest.mark.parametrize(("is_last_use", "dtype"), [(False, "F64"), (True, "F64"), (True, "F32")])
def test_of_what_is_read_for_the_last_time_the_page_cache_keeps_nothing(
    is_last_use: bool, dtype: str, tmp_path: Path
) -> None:
    found = set()
    for name in ("first", "second", "third", "fourth"):  # it is advice, which the kernel does not always take
        path = tmp_path / name
        make_uncached(path, 1 << 16)  # all of it is read: folios that reach beyond what is let go of stay
        files = FileReader(tmp_path, make_buffer(65536), is_last_use=is_last_use)
        files.read(View(name, NAME, "F64", 0, 2, 4096, 4096, 1), dtype, 0, make_buffer(65536), 0)
        found.add(is_cached(path, 5000))
    assert False in found if is_last_use else found == {True}
