"""The header of a `.safetensors` file: https://huggingface.co/docs/safetensors, "Format"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_convert.errors import CorruptFile
from dist_convert.read.source_file import reading
from dist_convert.records import DTYPE_BYTES, StoredTensor

#: The limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000
_LIMIT = 1 << 62


def read_safetensors_header(path: Path, file: str) -> dict[str, StoredTensor]:
    """Every tensor of the file by name.

    Args:
        path: the file on this machine.
        file: how messages and the tensors name it.

    Raises:
        CorruptFile: the header is too large, no JSON, or its tensors overlap, leave holes or lie outside the file.
        SourceError: the file cannot be read.
    """
    with reading(file), path.open("rb") as stream:
        size_bytes = path.stat().st_size
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if 2 <= length <= min(MAX_HEADER_BYTES, size_bytes - 8) else b""
    if not text:
        raise CorruptFile(
            "no safetensors header",
            file=file,
            expected=f"a header of at most {max(0, min(MAX_HEADER_BYTES, size_bytes - 8))} bytes",
            found=f"{length} bytes",
            remedy="copy the file again; this one is cut short or no safetensors file",
        )
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
        tensors = {
            name: _stored(name, entry, file, 8 + length) for name, entry in header.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFile("damaged safetensors header", file=file, found=f"{type(error).__name__}: {error}") from error
    position = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset_bytes, tensor.size_bytes)):
        if tensor.offset_bytes != position or position + tensor.size_bytes > size_bytes:
            raise CorruptFile(
                "a tensor does not follow the one before it, or lies outside the file",
                tensor=tensor.name,
                file=file,
                expected=f"bytes from {position} on, up to {size_bytes} at most",
                found=f"{tensor.offset_bytes}..{tensor.offset_bytes + tensor.size_bytes}",
                remedy="copy the file again; this one is cut short or damaged",
            )
        position += tensor.size_bytes
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that stands twice")
    return found


def _stored(name: str, entry: dict[str, Any], file: str, data_bytes: int) -> StoredTensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets]
    whole = all(type(number) is int and 0 <= number < _LIMIT for number in numbers) and len(offsets) == 2
    if not whole or dtype not in DTYPE_BYTES:
        raise ValueError(f"{name} has no known dtype, shape and data_offsets")
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    if offsets[1] - offsets[0] != step * DTYPE_BYTES[dtype]:
        raise ValueError(f"{name} of shape {shape} does not fill its data_offsets {offsets}")
    return StoredTensor(name, file, dtype, tuple(shape), tuple(reversed(strides)), data_bytes + offsets[0])
