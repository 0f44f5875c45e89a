"""One `model_optim_rng.pt` before any data: its args, the names of its tensors, and room for their values.

The file is what `torch.save` writes, with holes in place of the storages. torch lays the container out in memory, and
the pickle is made without a memo: no byte of it depends on which equal objects happen to be one object. Keys:
docs/formats.md, "Keys of the file"; container: docs/formats.md, "Storages".
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import operator
import pickle
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from dist_convert.errors import PlanError
from dist_convert.formats.megatron.target_args import TorchDtype
from dist_convert.records import DTYPE_BYTES, StoredTensor, TensorSpec
from dist_convert.write.files import make_file

CHECKPOINT_VERSION = 3.0
_PICKLE_PROTOCOL = 2  # torch.save's

#: Storage classes by safetensors dtype; the other dtypes have none, and lie in untyped storages.
_STORAGES = {
    "F64": torch.DoubleStorage, "F32": torch.FloatStorage, "F16": torch.HalfStorage, "BF16": torch.BFloat16Storage,
    "I64": torch.LongStorage, "I32": torch.IntStorage, "I16": torch.ShortStorage, "I8": torch.CharStorage,
    "U8": torch.ByteStorage, "BOOL": torch.BoolStorage,
}  # fmt: skip
_UNTYPED = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
}  # fmt: skip


@dataclass(frozen=True)
class _Storage:
    """Record `data/{key}` of the container; pickled as a reference."""

    kind: type
    key: int
    elements: int


@dataclass(frozen=True)
class _Tensor:
    """A contiguous tensor that fills record `data/{key}`; `dtype` is its safetensors name."""

    key: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def strides(self) -> tuple[int, ...]:
        steps = itertools.accumulate((max(length, 1) for length in self.shape[:0:-1]), operator.mul, initial=1)
        return tuple(steps)[::-1] if self.shape else ()

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


def _pickled(saved: object) -> bytes:
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


@dataclass(frozen=True)
class Skeleton:
    """A file before any data.

    Attributes:
        pieces: offset in bytes and content of everything that is not a tensor's value.
        size_bytes: of the whole file.
        chunks: per virtual pipeline stage, where each tensor's values go, by name; what `read_shard` finds in the file.
    """

    pieces: tuple[tuple[int, bytes], ...]
    size_bytes: int
    chunks: tuple[dict[str, StoredTensor], ...]


def write_skeleton(
    path: Path, args: Mapping[str, object], iteration: int, chunks: Sequence[Sequence[TensorSpec]]
) -> None:
    """Make one rank's file in its final size, with zeros for every tensor, or what an earlier run has put there.

    Args:
        path: of the file; directories above it are made.
        args, iteration, chunks: see `lay_out_skeleton`.

    Raises:
        PlanError: see `lay_out_skeleton`.
        NotEnoughSpace, TargetError: see `make_file`.
    """
    skeleton = lay_out_skeleton(args, iteration, chunks, str(path))
    make_file(path, str(path), skeleton.pieces, skeleton.size_bytes)


def lay_out_skeleton(
    args: Mapping[str, object], iteration: int, chunks: Sequence[Sequence[TensorSpec]], file: str
) -> Skeleton:
    """One rank's file in memory, without memory for its tensors.

    The bytes follow from the first three arguments alone; the order of `args` has no part in them.

    Args:
        args: the attributes of the training arguments. Values: None, bool, int, float, str, `TorchDtype`, and lists,
            tuples and dicts of these.
        iteration: training step.
        chunks: per virtual pipeline stage, the tensors (name, safetensors dtype, shape) in their order.
        file: how messages and the tensors' places name it.

    Raises:
        PlanError: a value of another kind, or two tensors of one name.
    """
    arguments = argparse.Namespace()
    vars(arguments).update({name: _plain(args[name], name, file) for name in sorted(args)})  # one may be called `self`
    saved: dict[str, object] = {
        "args": arguments,
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": iteration,
    }
    keys = itertools.count()
    models: dict[str, OrderedDict[str, _Tensor]] = {}
    for virtual, specs in enumerate(chunks):
        model = OrderedDict((name, _Tensor(next(keys), dtype, tuple(shape))) for name, dtype, shape in specs)
        if len(model) < len(specs):
            [(repeated, _)] = Counter(name for name, _, _ in specs).most_common(1)
            raise PlanError("two tensors of one name", tensor=repeated, file=file)
        models["model" if len(chunks) == 1 else f"model{virtual}"] = model
    tensors = [tensor for model in models.values() for tensor in model.values()]
    recorder, offsets_bytes = _lay_out_container(_pickled(saved | models), [tensor.size_bytes for tensor in tensors])
    places = tuple(
        {
            name: StoredTensor(
                name if len(chunks) == 1 else f"{key}.{name}", file, t.dtype, t.shape, t.strides, offsets_bytes[t.key]
            )
            for name, t in model.items()
        }
        for key, model in models.items()
    )
    pieces = tuple((start, bytes(piece)) for start, piece in recorder.pieces)
    return Skeleton(pieces, recorder.position_bytes, places)


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


def _lay_out_container(pickled: bytes, sizes_bytes: Sequence[int]) -> tuple[_Recorder, list[int]]:
    """The records of `torch.save` in its order (torch/serialization.py, `_save`), and where each storage's data goes.

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
    return recorder, offsets_bytes
