"""Digests of what is stored, which all ranks learn: what lies on different nodes is compared by them."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from dist_convert.models.catalog import Region, cut
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.discover import Discovery
from dist_convert.read.file_reader import FileReader, make_buffer
from dist_convert.records import DTYPE_BYTES, Box, View, tiles

SAMPLE_BYTES = 64 << 10
ALL_BYTES = 1 << 62
BLOCK_BYTES = 4 << 20

#: Begins the digest of values that are all the same; the value follows, in hexadecimal digits.
ALIKE = "all "


def reader_of(directory: Path, found: Discovery) -> closing[FileReader]:
    """Reads views of a checkpoint's files, in blocks of at most `BLOCK_BYTES`."""
    return closing(FileReader(directory, make_buffer(2 * BLOCK_BYTES), found.listing))


def samples(
    directory: Path,
    found: Discovery,
    wanted: Sequence[tuple[View, str]],
    world: World,
    *,
    sample_bytes: int = SAMPLE_BYTES,
) -> list[str]:
    """A digest of the first, middle and last rows of each view, as values of a dtype; the same on every rank.

    Each is read by the first rank that sees its file. That of values that are all the same begins with `ALIKE`.
    """
    readers = {view.file: next(n for n, files in enumerate(found.visible) if view.file in files) for view, _ in wanted}
    with reader_of(directory, found) as reader:
        mine = {
            str(number): _sample(reader, view, dtype, sample_bytes)
            for number, (view, dtype) in enumerate(wanted)
            if readers[view.file] == world.rank
        }
    told: dict[str, str] = {}
    for of_rank in gather_objects(world, mine):
        told |= of_rank
    return [told[str(number)] for number in range(len(wanted))]


def are_equal(
    directory: Path, found: Discovery, first: Sequence[Region], second: Sequence[Region], world: World
) -> bool:
    """Whether two matrices of one shape and dtype have the same values, by the digests of all of them."""
    parts = [(one.window(part.box)[0], part.replicas[0]) for one in first for part in cut(second, one.box)]
    wanted = [(view, view.value_dtype) for pair in parts for view in pair]
    digests = samples(directory, found, wanted, world, sample_bytes=ALL_BYTES)
    return digests[::2] == digests[1::2]


def _sample(reader: FileReader, view: View, dtype: str, sample_bytes: int) -> str:
    item_bytes = DTYPE_BYTES[dtype]
    rows = min(view.rows, max(1, sample_bytes // (view.columns * item_bytes)))
    starts = dict.fromkeys((0, (view.rows - rows) // 2, view.rows - rows))
    windows = [window for first in starts for window in _windows(view.window(Box(first, 0, rows, view.columns)))]
    buffer = make_buffer(max(window.rows * window.columns for window in windows) * item_bytes)
    digest, items = hashlib.sha256(), set[bytes]()
    for window in windows:
        reader.read(window, dtype, 0, buffer, 0)
        found = buffer.memory[: window.rows * window.columns * item_bytes].tobytes()
        digest.update(found)
        items.add(found[:item_bytes] if found == found[:item_bytes] * (len(found) // item_bytes) else b"")
    return ALIKE + items.pop().hex() if len(items) == 1 and len(min(items)) == item_bytes else digest.hexdigest()


def _windows(view: View) -> Iterator[View]:
    """A view in parts whose elements lie near enough to each other to be read together."""
    columns = min(view.columns, 512) if view.is_transposed else view.columns
    rows = max(1, BLOCK_BYTES // (columns * DTYPE_BYTES[view.dtype]))
    for tile in tiles(view.rows, view.columns, rows, columns):
        yield view.window(tile)
