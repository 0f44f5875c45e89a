"""A stand-in: importing it makes a device `hpu`, whose memory is tensors of the host, and `torch.hpu` with its streams.

`STAND_IN_HPU_CARDS` is the number of cards (8). Pinned memory is refused, as by a machine that allows none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import backend_registration


class HpuTensor(torch.Tensor):
    """A tensor on the device; `memory` is where its values are."""

    memory: torch.Tensor


class Stream:
    """Work is done at once, in any stream."""


class Module(backend_registration._DummyBackendModule):
    """What becomes `torch.hpu`."""

    Stream = Stream

    def device_count(self) -> int:
        return int(os.environ.get("STAND_IN_HPU_CARDS", "8"))

    def is_available(self) -> bool:
        return self.device_count() > 0

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        assert isinstance(stream, Stream)
        yield


def on_device(memory: torch.Tensor) -> HpuTensor:
    tensor: Any = torch._C._acc.create_empty_tensor(memory.size(), memory.dtype)
    tensor.__class__ = HpuTensor
    tensor.memory = memory
    assert isinstance(tensor, HpuTensor)
    return tensor


def empty(size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> HpuTensor:
    return on_device(torch.empty(size, dtype=dtype))


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    ends = [tensor.memory if isinstance(tensor, HpuTensor) else tensor for tensor in (source, target)]
    ends[1].copy_(ends[0])
    return target


def slice_of(tensor: HpuTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    return on_device(torch.ops.aten.slice.Tensor(tensor.memory, dim, start, end, step))


backend_registration._setup_privateuseone_for_python_backend("hpu", backend_module=Module())
operators = torch.library.Library("aten", "IMPL")
for name, function in {"empty.memory_format": empty, "_copy_from": copy_from, "slice.Tensor": slice_of}.items():
    operators.impl(name, function, "PrivateUse1")
