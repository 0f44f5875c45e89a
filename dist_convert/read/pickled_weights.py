"""The header of a `pytorch_model.bin`: the pickle and the zip's directory, nothing run and no data read.

Format: https://docs.pytorch.org/docs/stable/notes/serialization.html; storages: docs/formats.md, "Storages".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dist_convert.errors import CorruptFile, UnsupportedModel
from dist_convert.read.restricted_pickle import Tensor, load
from dist_convert.read.zip_container import Container, data_offsets_bytes, open_container, read_small_record
from dist_convert.records import DTYPE_BYTES, StoredTensor


def read_pickled_weights(path: Path, file: str) -> dict[str, StoredTensor]:
    """Every tensor of the file, by name, with the strides that it was saved with.

    Args:
        path: the file on this machine.
        file: how messages and the tensors name it.

    Raises:
        CorruptFile, UnsafePickle: see `zip_container` and `restricted_pickle`; or a tensor outside its storage.
        UnsupportedModel: no flat dict of tensors, or of a big-endian machine.
    """
    container = open_container(path, file)
    if "byteorder" in container.records and read_small_record(container, "byteorder") != b"little":
        raise UnsupportedModel("saved on a big-endian machine", file=file, expected="little endian")
    saved = load(read_small_record(container, "data.pkl"), file)
    if not isinstance(saved, Mapping):
        raise CorruptFile("not a weights file", file=file, expected="a dict of tensors", found=type(saved).__name__)
    others = [
        f"{name}: {type(value).__name__}"
        for name, value in saved.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if others:
        raise UnsupportedModel(
            "a weights file that holds more than tensors by name",
            file=file,
            expected="the flat dict of tensors that save_pretrained writes",
            found=", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else ""),
            remedy="load the model with transformers and save it with save_pretrained",
        )
    return _stored_tensors(saved, container)


def _stored_tensors(tensors: Mapping[str, Tensor], container: Container) -> dict[str, StoredTensor]:
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
                remedy="copy or download the file again",
            )
        offset_bytes = offsets_bytes[record] + tensor.offset * DTYPE_BYTES[dtype]
        stored[name] = StoredTensor(name, container.label, dtype, tensor.shape, tensor.strides, offset_bytes)
    return stored
