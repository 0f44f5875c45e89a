"""What `torch.save` writes, with holes in place of the storages.

torch lays the container out in memory, and the pickle is made without a memo: no byte of it depends on which equal
objects happen to be one object. Keys: docs/formats.md, "Keys of the file"; container: docs/formats.md, "Storages".
"""

import argparse
import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from dist_convert.errors import PlanError
from dist_convert.formats.megatron.target_args import TorchDtype
from dist_convert.records import DTYPE_BYTES, row_major

CHECKPOINT_VERSION = 3.0
_PICKLE_PROTOCOL = 2  # torch.save's

#: Offset in bytes and content of what is no storage's data.
Pieces = tuple[tuple[int, bytes], ...]

#: Storage classes by safetensors dtype; the other dtypes have none, and lie in untyped storages.
_STORAGES = {
    "F64": torch.DoubleStorage, "F32": torch.FloatStorage, "F16": torch.HalfStorage, "BF16": torch.BFloat16Storage,
    "I64": torch.LongStorage, "I32": torch.IntStorage, "I16": torch.ShortStorage, "I8": torch.CharStorage,
    "U8": torch.ByteStorage, "BOOL": torch.BoolStorage,
    "C64": torch.ComplexFloatStorage, "C128": torch.ComplexDoubleStorage,
}  # fmt: skip
_UNTYPED = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
}  # fmt: skip


@dataclass(frozen=True)
class _Storage:
    """Record `data/{key}` of the container; pickled as a reference."""

    kind: type
    key: int
    elements: int


@dataclass(frozen=True)
class SavedTensor:
    """A contiguous tensor that fills record `data/{key}`; `dtype` is its safetensors name."""

    key: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def strides(self) -> tuple[int, ...]:
        return row_major(self.shape)

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def __reduce__(self) -> tuple[Any, ...]:
        """As torch's tensors are reduced: storage, offset, shape, strides, requires_grad, backward hooks."""
        hooks: OrderedDict[str, object] = OrderedDict()  # annotated, not subscripted: that would be pickled too
        layout = (0, self.shape, self.strides, False, hooks)
        if self.dtype in _UNTYPED:
            storage = _Storage(torch.UntypedStorage, self.key, self.size_bytes)
            return torch._utils._rebuild_tensor_v3, (storage, *layout, _UNTYPED[self.dtype])
        storage = _Storage(_STORAGES[self.dtype], self.key, math.prod(self.shape))
        return torch._utils._rebuild_tensor_v2, (storage, *layout)


class _Pickler(pickle.Pickler):
    def __init__(self, output: io.BytesIO) -> None:
        super().__init__(output, _PICKLE_PROTOCOL)
        self.fast = True  # no memo

    def persistent_id(self, value: object) -> tuple[str, type, str, str, int] | None:
        """Storages are referred to, as torch.save does; everything else is in the pickle."""
        if isinstance(value, _Storage):
            return ("storage", value.kind, str(value.key), "cpu", value.elements)
        return None


def pickled(saved: object) -> bytes:
    """What `torch.save` pickles an object as, with `SavedTensor` in place of tensors."""
    output = io.BytesIO()
    _Pickler(output).dump(saved)
    return output.getvalue()


class _Recorder:
    """A file that torch writes to: keeps what is written, and where, and passes over what is skipped."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytearray]] = [(0, bytearray())]
        self.position_bytes = 0
        self.skipped_at_bytes = 0

    def write(self, data: memoryview) -> int:
        start, piece = self.pieces[-1]
        if start + len(piece) != self.position_bytes:
            self.pieces.append((self.position_bytes, piece := bytearray()))
        piece += data
        self.position_bytes += len(data)
        return len(data)

    def seek(self, distance_bytes: int, _whence: int) -> None:
        self.skipped_at_bytes = self.position_bytes
        self.position_bytes += distance_bytes


def common_content(args: Mapping[str, object], iteration: int, file: str) -> dict[str, object]:
    """What a file of Megatron holds beside the model; the order of `args` has no part in it.

    Args:
        args: the attributes of the training arguments. Values: None, bool, int, float, str, `TorchDtype`, and lists,
            tuples and dicts of these.
        iteration: training step.
        file: how messages name it.

    Raises:
        PlanError: a value of another kind.
    """
    arguments = argparse.Namespace()
    vars(arguments).update({name: _plain(args[name], name, file) for name in sorted(args)})  # one may be called `self`
    return {"args": arguments, "checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration}


def _plain(value: object, name: str, file: str) -> object:
    """A copy with real torch dtypes.

    Exact types only: what derives from them (an enum, a numpy scalar) pickles with the name of its class.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_plain(item, name, file) for item in value]
    if type(value) is tuple:
        return tuple(_plain(item, name, file) for item in value)
    if type(value) is dict:
        return {_plain(key, name, file): _plain(item, name, file) for key, item in value.items()}
    if isinstance(value, TorchDtype) and isinstance(dtype := getattr(torch, value.name, None), torch.dtype):
        return dtype
    raise PlanError(
        f"argument {name!r} cannot be written to a checkpoint",
        file=file,
        expected="None, bool, int, float, str, a torch dtype, or lists, tuples and dicts of these",
        found=f"{value!r} of type {type(value).__name__}",
    )


def lay_out_container(pickled: bytes, sizes_bytes: Sequence[int]) -> tuple[Pieces, int, list[int]]:
    """The records of `torch.save` in its order (torch/serialization.py, `_save`), without memory for storages' data.

    Args:
        pickled: the object.
        sizes_bytes: of each storage.

    Returns:
        What is no storage's data, the size in bytes of it all, and where each storage's data goes.

    Kept in memory, because torch ends the process when a file system refuses a write.
    """
    recorder = _Recorder()
    # The defaults, 64 bytes of alignment and checksums, whatever the options of torch.save are in this process.
    writer = cast(Any, torch._C.PyTorchFileWriter)(recorder)
    small = {"data.pkl": pickled, ".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little"}
    for name, data in small.items():
        writer.write_record(name, data, len(data))
    offsets_bytes = []
    for key, size_bytes in enumerate(sizes_bytes):
        writer.write_record_metadata(f"data/{key}", size_bytes)
        # Nothing is skipped for an empty storage, and nothing written behind it.
        offsets_bytes.append(recorder.skipped_at_bytes if size_bytes else recorder.position_bytes)
    writer.write_end_of_file()
    pieces = tuple((start, bytes(piece)) for start, piece in recorder.pieces)
    return pieces, recorder.position_bytes, offsets_bytes
