"""The header of a `.safetensors` file: https://huggingface.co/docs/safetensors, "Format"."""

from __future__ import annotations

import json
from pathlib import Path

from dist_convert.errors import CorruptFile
from dist_convert.records import DTYPE_BYTES, StoredTensor

#: The limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000


def read_safetensors_header(path: Path, file: str) -> dict[str, StoredTensor]:
    """Every tensor of the file by name.

    Args:
        path: the file on this machine.
        file: how messages and the tensors name it.

    Raises:
        CorruptFile: the header is too large, no JSON, or names bytes outside the file.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size_bytes - 8):
            raise CorruptFile(
                "no safetensors header",
                file=file,
                expected=f"a header of at most {max(0, min(MAX_HEADER_BYTES, size_bytes - 8))} bytes",
                found=f"{length} bytes",
                remedy="copy the file again; this one is cut short or no safetensors file",
            )
        text = stream.read(length)
    try:
        header = json.loads(text)
        tensors = {
            name: _stored(name, entry, file, 8 + length) for name, entry in header.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFile("damaged safetensors header", file=file, found=f"{type(error).__name__}: {error}") from error
    for tensor in tensors.values():
        if tensor.offset_bytes < 8 + length or tensor.offset_bytes + tensor.size_bytes > size_bytes:
            raise CorruptFile(
                "a tensor lies outside its file",
                tensor=tensor.name,
                file=file,
                expected=f"bytes {8 + length}..{size_bytes}",
                found=f"{tensor.offset_bytes}..{tensor.offset_bytes + tensor.size_bytes}",
                remedy="copy the file again; this one is cut short",
            )
    return tensors


def _stored(name: str, entry: dict[str, object], file: str, data_bytes: int) -> StoredTensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and dtype in DTYPE_BYTES and isinstance(shape, list) and isinstance(offsets, list)):
        raise ValueError(f"{name} has no known dtype, shape and data_offsets")
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    if offsets[1] - offsets[0] != step * DTYPE_BYTES[dtype]:
        raise ValueError(f"{name} of shape {shape} does not fill its data_offsets {offsets}")
    return StoredTensor(name, file, dtype, tuple(shape), tuple(reversed(strides)), data_bytes + offsets[0])
