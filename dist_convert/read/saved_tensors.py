"""What `torch.save` wrote into a file: the pickled object, and where its tensors lie. Nothing run, no data read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_convert.errors import CorruptFile, UnsupportedModel
from dist_convert.read.pickle_records import Tensor
from dist_convert.read.restricted_pickle import load
from dist_convert.read.zip_container import Container, data_offsets_bytes, open_container, read_small_record
from dist_convert.records import DTYPE_BYTES, StoredTensor


def open_saved(path: Path, file: str) -> tuple[Container, Mapping[str, Any]]:
    """The container of a file, and the dict that was saved in it, with inert records in place of objects.

    Args:
        path: the file on this machine.
        file: how messages name it.

    Raises:
        CorruptFile, UnsafePickle: see `zip_container` and `restricted_pickle`; or it holds something else than a dict.
        UnsupportedModel: saved on a big-endian machine.
    """
    container = open_container(path, file)
    if "byteorder" in container.records and read_small_record(container, "byteorder") != b"little":
        raise UnsupportedModel("saved on a big-endian machine", file=file, expected="little endian")
    saved = load(read_small_record(container, "data.pkl"), file)
    if not isinstance(saved, Mapping):
        raise CorruptFile("not a checkpoint file", file=file, expected="a dict", found=type(saved).__name__)
    return container, saved


def place_tensors(tensors: Mapping[str, Tensor], container: Container) -> dict[str, StoredTensor]:
    """Where each tensor's first element is in the file, and how the others follow.

    Args:
        tensors: by the name that the places shall have.
        container: of the file.

    Raises:
        CorruptFile: a tensor reaches past its storage, or a storage is damaged.
    """
    offsets_bytes = data_offsets_bytes(container, sorted({f"data/{t.storage.key}" for t in tensors.values()}))
    stored = {}
    for name, tensor in tensors.items():
        record, dtype = f"data/{tensor.storage.key}", tensor.storage.dtype
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
        end_bytes = (tensor.offset + reach + 1) * DTYPE_BYTES[dtype] if all(tensor.shape) else 0
        if end_bytes > container.records[record].size_bytes:
            raise CorruptFile(
                "a tensor reaches past its storage",
                tensor=name,
                file=container.label,
                expected=f"at least {end_bytes} bytes in {record}",
                found=f"{container.records[record].size_bytes} bytes",
                remedy="copy the file again from where it was saved",
            )
        offset_bytes = offsets_bytes[record] + tensor.offset * DTYPE_BYTES[dtype]
        stored[name] = StoredTensor(name, container.label, dtype, tensor.shape, tensor.strides, offset_bytes)
    return stored
