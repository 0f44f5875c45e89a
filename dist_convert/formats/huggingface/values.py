"""Values that must be known before a conversion can be planned: a head that should be tied, biases that should be zero.

transformers 4 drops a tied head that is stored on loading; transformers 5 warns, and keeps it where its values differ.
So a head that differs leaves open which model is meant (docs/formats.md, "Shards and index"). transformers' Llama
stores an output bias wherever queries, keys and values have biases. Megatron has no place for it where only those have
biases; zeros need none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from dist_convert.errors import InconsistentShards
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.buffers import make_buffer
from dist_convert.read.file_reader import FileReader
from dist_convert.records import DTYPE_BYTES, StoredTensor, View, tiles

_BLOCK_BYTES = 4 << 20


def check_tied_head(
    world: World, directory: Path, visible: Sequence[frozenset[str]], embedding: View, head: StoredTensor
) -> None:
    """Refuse a head that is not the embedding; one rank reads both, a block at a time.

    Args:
        world: this rank.
        directory: of the model.
        visible: for each rank, the weights files that it can read.
        embedding: as rows x columns.
        head: the stored tensor.

    Raises:
        InconsistentShards: they differ, or no rank can compare them.
    """
    same_shape = (embedding.dtype, (embedding.rows, embedding.columns)) == (head.dtype, head.shape)
    if same_shape and replace(View.of(head), tensor=embedding.tensor) == embedding:
        return  # one storage, as torch saves tied parameters
    able = [rank for rank, files in enumerate(visible) if {embedding.file, head.file} <= files]
    found = "another dtype or shape" if able else "the files on different nodes, where no rank can compare them"
    if same_shape and able:
        mine = _first_different_row(directory, embedding, View.of(head)) if world.rank == able[0] else None
        row = gather_objects(world, mine)[able[0]]
        if row is None:
            return
        found = f"other values from row {row} on"
    raise InconsistentShards(
        "the model is tied by config.json, but it also stores a head that is not its embedding",
        tensor=head.name,
        file=head.file,
        expected=f"the same values as {embedding.tensor} in {embedding.file}",
        found=found,
        remedy="if the head is the model's, set tie_word_embeddings to false in config.json; if it is a leftover, "
        "save the model again without it",
    )


def _first_different_row(directory: Path, first: View, second: View) -> int | None:
    rows = max(1, _BLOCK_BYTES // (first.columns * DTYPE_BYTES[first.dtype]))
    block_bytes = min(first.rows, rows) * first.columns * DTYPE_BYTES[first.dtype]
    buffers = make_buffer(block_bytes), make_buffer(block_bytes)
    with closing(FileReader(directory, make_buffer(2 * _BLOCK_BYTES))) as reader:
        for box in tiles(first.rows, first.columns, rows, first.columns):
            for view, buffer in zip((first, second), buffers, strict=True):
                reader.read(view.window(box), first.dtype, 0, buffer, 0)
            row_bytes = box.columns * DTYPE_BYTES[first.dtype]
            for row in range(box.rows):
                line = slice(row * row_bytes, (row + 1) * row_bytes)
                if buffers[0].memory[line] != buffers[1].memory[line]:
                    return box.row + row
    return None


_SCRATCH_BYTES = 4 << 20


def all_are_zero(
    world: World,
    directory: Path,
    visible: Sequence[frozenset[str]],
    stored: Mapping[str, StoredTensor],
    names: Collection[str],
) -> bool:
    """Whether vectors are stored and hold zeros only; each is read by the first rank that sees its file.

    Args:
        world: this rank.
        directory: of the model.
        visible: for each rank, the weights files that it can read.
        stored: all tensors of the model by name.
        names: of the vectors.

    Raises:
        SourceError: a file cannot be read.
    """
    if not names or not all(name in stored and len(stored[name].shape) == 1 for name in names):
        return False
    readers = {file: next(n for n, files in enumerate(visible) if file in files) for file in _files(stored, names)}
    mine = [stored[name] for name in sorted(names) if readers[stored[name].file] == world.rank]
    return all(gather_objects(world, _only_zeros(directory, mine)))


def _files(stored: Mapping[str, StoredTensor], names: Collection[str]) -> set[str]:
    return {stored[name].file for name in names}


def _only_zeros(directory: Path, tensors: Sequence[StoredTensor]) -> bool:
    with closing(FileReader(directory, make_buffer(_SCRATCH_BYTES))) as reader:
        for tensor in tensors:
            size_bytes = tensor.elements * DTYPE_BYTES[tensor.dtype]
            buffer = make_buffer(size_bytes)
            reader.read(View.of(tensor), tensor.dtype, 0, buffer, 0)
            if buffer.memory[:size_bytes].tobytes().strip(b"\0"):
                return False
    return True
