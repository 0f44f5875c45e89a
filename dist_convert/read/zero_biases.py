"""Finds out whether biases of the attention's output are all zeros.

transformers' Llama stores one wherever queries, keys and values have biases. Megatron has no place for it where only
those have biases; zeros need none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from dist_convert.move.buffers import make_buffer
from dist_convert.move.exchange import World, gather_objects
from dist_convert.read.file_reader import FileReader
from dist_convert.records import DTYPE_BYTES, StoredTensor, View

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
