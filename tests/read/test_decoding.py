"""Quantised views: every window of codes is read as the values that it stands for by its publisher's rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_convert.errors import CorruptFile, SourceChanged
from dist_convert.read.file_reader import FileReader, make_buffer
from dist_convert.read.source import file_signature
from dist_convert.records import DTYPE_BYTES, Box, Scales, View, side_by_side
from tests.quantised import packed, quantised, unpacked, values

ROWS, COLUMNS, BLOCK = 75, 50, (32, 16)
CODES, SCALES = quantised(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)), BLOCK)
MEANT = values(CODES, SCALES, BLOCK)
START = 8
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E8M0": torch.float8_e8m0fnu}


def scales_of(columns: int, *block: int, dtype: str = "F32") -> Scales:
    """Scales of so many in a row."""
    return Scales(View("scales", "w_scale_inv", dtype, 0, 1, 1, columns, 1), *block)


VIEW = View("weights", "w", "F8_E4M3", START, ROWS, COLUMNS, COLUMNS, 1, scales_of(4, *BLOCK))
#: The same in four bits, two to a byte.
BLOCKS, POWERS = packed(torch.randn(1, ROWS, 64, generator=torch.Generator().manual_seed(2)))
UNPACKED = unpacked(BLOCKS, POWERS)[0]
PACKED_VIEW = View(
    "weights", "w_blocks", "U8", START, ROWS, 64, 32, 1,
    scales_of(2, 1, 32, 2, dtype="F8_E8M0"),
)  # fmt: skip


def write(root: Path, codes: torch.Tensor = CODES, scales: torch.Tensor = SCALES) -> None:
    (root / "weights").write_bytes(b"\xff" * START + codes.view(torch.uint8).numpy().tobytes())
    (root / "scales").write_bytes(scales.contiguous().view(torch.uint8).numpy().tobytes())


def read(root: Path, view: View, dtype: str = "BF16", scratch_bytes: int = 65536) -> torch.Tensor:
    size_bytes = view.rows * view.columns * DTYPE_BYTES[dtype]
    buffer = make_buffer(size_bytes)
    FileReader(root, make_buffer(scratch_bytes)).read(view, dtype, 0, buffer, 0)
    return buffer.tensor[:size_bytes].clone().view(TORCH[dtype]).view(view.rows, view.columns)


def test_a_value_is_its_code_times_the_scale_of_its_block(tmp_path: Path) -> None:
    codes = torch.tensor([[0x38, 0xB8, 0x01], [0x7E, 0x00, 0x3C]], dtype=torch.uint8)  # 1, -1, 2**-9; 448, 0, 1.5
    write(tmp_path, codes, torch.tensor([[0.5, 4.0]]))
    scales = scales_of(2, 2, 2)
    found = read(tmp_path, View("weights", "w", "F8_E4M3", START, 2, 3, 3, 1, scales), "F32")
    assert found.tolist() == [[0.5, -0.5, 2**-7], [224.0, 0.0, 6.0]]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_values_are_rounded_once_to_the_dtype_that_is_asked_for(dtype: str, tmp_path: Path) -> None:
    write(tmp_path)
    assert torch.equal(read(tmp_path, VIEW, dtype), MEANT.to(TORCH[dtype]))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E8M0"])
def test_scales_of_any_dtype_are_multiplied_as_they_are(dtype: str, tmp_path: Path) -> None:
    scales = SCALES.to(TORCH[dtype])
    write(tmp_path, scales=scales)
    found = read(tmp_path, replace(VIEW, scales=scales_of(4, *BLOCK, dtype=dtype)), "F32")
    assert torch.equal(found, values(CODES, scales, BLOCK))


@pytest.mark.parametrize("scratch_bytes", [512, 65536])  # the first holds a few rows
@pytest.mark.parametrize("block", [(1, COLUMNS), (ROWS, COLUMNS), (128, 128), (7, 1)], ids=str)
def test_blocks_of_any_size_are_decoded_in_parts_that_fit(
    block: tuple[int, int], scratch_bytes: int, tmp_path: Path
) -> None:
    codes, scales = quantised(MEANT, block)
    write(tmp_path, codes, scales)
    by = scales_of(scales.shape[1], *block)
    window = replace(VIEW, scales=by).window(Box(0, 3, ROWS, 20))
    assert torch.equal(read(tmp_path, window, "F32", scratch_bytes), values(codes, scales, block)[:, 3:23])


@pytest.mark.parametrize("in_bits", [8, 4])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_windows_of_windows_are_decoded_alike(in_bits: int, data: st.DataObject, tmp_path: Path) -> None:
    codes, scales, view, meant = (
        (CODES, SCALES, VIEW, MEANT.bfloat16()) if in_bits == 8 else (BLOCKS, POWERS, PACKED_VIEW, UNPACKED)
    )
    if not (tmp_path / "weights").exists():
        write(tmp_path, codes, scales)
    for _ in range(2):
        row, column = data.draw(st.integers(0, view.rows - 1)), data.draw(st.integers(0, view.columns - 1))
        rows, columns = (data.draw(st.integers(1, n)) for n in (view.rows - row, view.columns - column))
        view = view.window(Box(row, column, rows, columns))
        meant = meant[row : row + rows, column : column + columns]
    assert torch.equal(read(tmp_path, view), meant)


@pytest.mark.parametrize("column", [1, 16, 20, 48])
@pytest.mark.parametrize("view", [VIEW, PACKED_VIEW], ids=["a byte", "four bits"])
def test_windows_side_by_side_are_one_again(view: View, column: int) -> None:
    rows = Box(5, 0, 60, 50)
    left, right = (view.window(replace(rows, column=at, columns=n)) for at, n in ((0, column), (column, 50 - column)))
    assert side_by_side(left, right) == view.window(rows)
    assert right.scales
    other = replace(right.scales, first=replace(right.scales.first, tensor="another"))
    assert side_by_side(left, replace(right, scales=other)) is None


@pytest.mark.parametrize(("first", "step"), [(0, 2), (1, 2), (2, 3)])
def test_rows_of_four_bits_take_turns_with_their_scales(first: int, step: int, tmp_path: Path) -> None:
    write(tmp_path, BLOCKS, POWERS)
    begun = PACKED_VIEW.window(Box(first, 0, ROWS - first, 64))
    window = begun.with_row_stride((ROWS - first) // step, step * 32).window(Box(1, 33, 20, 30))
    assert torch.equal(read(tmp_path, window), UNPACKED[first::step][1:21, 33:63])


def test_four_bits_are_what_transformers_makes_of_them_for_every_scale(tmp_path: Path) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 253, 1, 1)
    powers = torch.arange(253, dtype=torch.uint8).view(1, 253, 1).repeat(1, 1, 16)
    write(tmp_path, blocks, powers)
    by = scales_of(16, 1, 32, 2, dtype="F8_E8M0")
    found = read(tmp_path, View("weights", "w_blocks", "U8", START, 253, 512, 256, 1, by))
    assert torch.equal(found.view(torch.int16), unpacked(blocks, powers)[0].view(torch.int16))


@pytest.mark.parametrize("power", [253, 255])  # 6 times 2**126 is no float32; not a number
def test_four_bits_that_stand_for_no_finite_number_are_an_error(power: int, tmp_path: Path) -> None:
    powers = POWERS.clone()
    powers[0, 40, 1] = power
    write(tmp_path, BLOCKS, powers)
    with pytest.raises(CorruptFile, match="is not a finite number"):
        read(tmp_path, PACKED_VIEW)


def test_a_row_is_repeated_with_its_scales(tmp_path: Path) -> None:
    write(tmp_path)
    found = read(tmp_path, VIEW.window(Box(70, 3, 1, 40)).with_row_stride(100, 0))
    assert torch.equal(found, MEANT[70, 3:43].bfloat16().expand(100, 40))


def test_bytes_of_scales_are_counted(tmp_path: Path) -> None:
    write(tmp_path)
    files, window = FileReader(tmp_path, make_buffer(65536)), VIEW.window(Box(31, 15, 2, 20))
    files.read(window, "BF16", 0, make_buffer(4096), 0)
    assert files.read_bytes == window.size_bytes == 2 * 20 + 2 * 3 * 4


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_that_is_no_number_is_an_error_with_the_weights_name(code: int, tmp_path: Path) -> None:
    codes = CODES.view(torch.uint8).clone()
    codes[40, 30] = code
    write(tmp_path, codes)
    with pytest.raises(CorruptFile, match="is not a finite number") as error:
        read(tmp_path, VIEW)
    assert (error.value.tensor, error.value.file) == ("w", str(tmp_path / "weights"))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("F32", float("inf")), ("F32", float("nan")), ("F8_E8M0", float("nan"))],
    ids=["infinite", "not a number", "the byte 255"],
)
def test_a_scale_that_is_no_number_is_an_error_with_its_name(dtype: str, scale: float, tmp_path: Path) -> None:
    scales = SCALES.clone()
    scales[2, 3] = scale
    write(tmp_path, scales=scales.to(TORCH[dtype]))
    with pytest.raises(CorruptFile, match="is not a finite number") as error:
        read(tmp_path, replace(VIEW, scales=scales_of(4, *BLOCK, dtype=dtype)))
    assert (error.value.tensor, error.value.file) == ("w_scale_inv", str(tmp_path / "scales"))


def test_scales_that_end_early_are_an_error_with_their_name(tmp_path: Path) -> None:
    write(tmp_path, scales=SCALES[:2])
    with pytest.raises(CorruptFile, match="ends inside a tensor") as error:
        read(tmp_path, VIEW)
    assert (error.value.tensor, error.value.file) == ("w_scale_inv", str(tmp_path / "scales"))


def test_scales_that_change_while_they_are_read_are_an_error(tmp_path: Path) -> None:
    write(tmp_path)
    known = {"scales": file_signature(tmp_path / "scales")}
    (tmp_path / "scales").write_bytes(bytes(100))
    with pytest.raises(SourceChanged) as error:
        FileReader(tmp_path, make_buffer(65536), known).read(VIEW, "BF16", 0, make_buffer(65536), 0)
    assert (error.value.tensor, error.value.file) == ("w_scale_inv", str(tmp_path / "scales"))
