"""The Hugging Face weights files before any data: names, headers, sizes and every tensor's place.

File format: https://huggingface.co/docs/safetensors ("Format"); names and index: docs/formats.md, "Shards and index".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from dist_convert.records import DTYPE_BYTES, StoredTensor, TargetFile, TensorSpec
from dist_convert.write.files import make_file

INDEX_FILE = "model.safetensors.index.json"

#: Data begins at a multiple of this, the size of a page. What is written then lies in memory and in the file's pages at
#: like offsets: processors copy at half their speed where the file's is a few bytes further. The format wants eight.
_DATA_ALIGNMENT_BYTES = 4096
_LENGTH_BYTES = 8


def _size_bytes(spec: TensorSpec) -> int:
    size = DTYPE_BYTES[spec[1]]
    for length in spec[2]:
        size *= length
    return size


def lay_out_files(specs: Iterable[TensorSpec], max_shard_size_bytes: int) -> tuple[TargetFile, ...]:
    """Fill files in the given order of tensors, a new one where the next tensor would exceed the size.

    As `save_pretrained` does, sizes count tensor bytes and a tensor larger than the limit has a file of its own, while
    the file before it stays open.
    """
    groups: list[list[TensorSpec]] = []
    current: list[TensorSpec] = []
    filled = 0
    for spec in specs:
        size_bytes = _size_bytes(spec)
        if size_bytes > max_shard_size_bytes:
            groups.append([spec])
            continue
        if filled + size_bytes > max_shard_size_bytes:
            groups.append(current)
            current, filled = [], 0
        current.append(spec)
        filled += size_bytes
    groups += [current] if current else []
    if len(groups) == 1:
        return (_target_file("model.safetensors", groups[0]),)
    total = len(groups)
    return tuple(
        _target_file(f"model-{number:05d}-of-{total:05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    )


def _target_file(name: str, specs: Sequence[TensorSpec]) -> TargetFile:
    # Readers view the data in place, so wider elements come first and every tensor is aligned to its own.
    ordered = sorted(specs, key=lambda spec: -DTYPE_BYTES[spec[1]])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, offset = [], 0
    for spec in ordered:
        tensor, dtype, shape = spec
        end = offset + _size_bytes(spec)
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        places.append((spec, offset))
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _DATA_ALIGNMENT_BYTES)
    prefix = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    tensors = tuple(
        StoredTensor(tensor, name, dtype, shape, _row_major(shape), len(prefix) + offset)
        for (tensor, dtype, shape), offset in places
    )
    return TargetFile(name, prefix, len(prefix) + offset, tensors)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def make_files(directory: Path, files: Sequence[TargetFile]) -> None:
    """Make every file in its final size: its header, then zeros, or what an earlier run has put there.

    Raises:
        TargetError, NotEnoughSpace: the file system refuses.
    """
    for file in files:
        make_file(directory / file.name, file.name, [(0, file.header)], file.size_bytes)


def stored_dtype(files: Sequence[TargetFile]) -> str:
    """The safetensors name of the dtype in which most bytes are stored."""
    sizes: Counter[str] = Counter()
    for file in files:
        for tensor in file.tensors:
            sizes[tensor.dtype] += tensor.size_bytes
    return sizes.most_common(1)[0][0]


def write_index(directory: Path, files: Sequence[TargetFile]) -> None:
    """Write the index file, where there are several weights files."""
    index = index_json(files)
    if index is not None:
        (directory / INDEX_FILE).write_text(index, encoding="utf-8")


def index_json(files: Sequence[TargetFile]) -> str | None:
    """The text of the index file, or None where there is a single file."""
    if len(files) == 1:
        return None
    tensors = [tensor for file in files for tensor in file.tensors]
    index = {
        "metadata": {
            "total_size": sum(tensor.size_bytes for tensor in tensors),
            "total_parameters": sum(tensor.elements for tensor in tensors),
        },
        "weight_map": {tensor.name: tensor.file for tensor in tensors},
    }
    return json.dumps(index, indent=2) + "\n"
