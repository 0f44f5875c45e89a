"""Digests of a few values of stored tensors, which tell at little cost whether two of them hold the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing

from dist_convert.formats.torch.open import TorchModel
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.buffers import make_buffer
from dist_convert.read.file_reader import FileReader
from dist_convert.records import DTYPE_BYTES, Box, View, tiles

_SAMPLE_BYTES = 64 << 10
BLOCK_BYTES = 4 << 20

#: Begins the digest of values that are all the same.
ALIKE = "all "


def reader_of(model: TorchModel) -> closing[FileReader]:
    """Reads views of a model's files, in blocks of at most `BLOCK_BYTES`."""
    return closing(FileReader(model.directory, make_buffer(2 * BLOCK_BYTES), model.found.listing))


def samples(model: TorchModel, wanted: Sequence[tuple[View, str]], world: World) -> list[str]:
    """A digest of the first, middle and last rows of each view, as values of a dtype; the same on every rank.

    Each is read by the first rank that sees its file. That of values that are all the same begins with `ALIKE`.
    """
    readers = {
        view.file: next(n for n, files in enumerate(model.found.visible) if view.file in files) for view, _ in wanted
    }
    with reader_of(model) as reader:
        mine = {
            str(number): _sample(reader, view, dtype)
            for number, (view, dtype) in enumerate(wanted)
            if readers[view.file] == world.rank
        }
    told: dict[str, str] = {}
    for of_rank in gather_objects(world, mine):
        told |= of_rank
    return [told[str(number)] for number in range(len(wanted))]


def _sample(reader: FileReader, view: View, dtype: str) -> str:
    item_bytes = DTYPE_BYTES[dtype]
    rows = min(view.rows, max(1, _SAMPLE_BYTES // (view.columns * item_bytes)))
    buffer = make_buffer(rows * view.columns * item_bytes)
    digest, items = hashlib.sha256(), set[bytes]()
    for first in dict.fromkeys((0, (view.rows - rows) // 2, view.rows - rows)):
        for window in _windows(view.window(Box(first, 0, rows, view.columns))):
            reader.read(window, dtype, 0, buffer, 0)
            found = buffer.memory[: window.rows * window.columns * item_bytes].tobytes()
            digest.update(found)
            items.add(found[:item_bytes] if found == found[:item_bytes] * (len(found) // item_bytes) else found)
    return ALIKE + items.pop().hex() if len(items) == 1 and len(min(items)) == item_bytes else digest.hexdigest()


def _windows(view: View) -> Iterator[View]:
    """A view in parts whose elements lie near enough to each other to be read together."""
    columns = min(view.columns, 512) if view.is_transposed else view.columns
    rows = max(1, BLOCK_BYTES // (columns * DTYPE_BYTES[view.dtype]))
    for tile in tiles(view.rows, view.columns, rows, columns):
        yield view.window(tile)
