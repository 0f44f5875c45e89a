"""The memory of the data path: page-aligned buffers, and what accelerators gather through; made once, used always."""

import contextlib
import mmap
from dataclasses import dataclass

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Buffer:
    """The same memory as bytes for system calls and as a uint8 tensor for torch."""

    memory: memoryview
    tensor: torch.Tensor


def make_buffer(size_bytes: int, device: torch.device = CPU) -> Buffer:
    """A page-aligned buffer of at least one byte in the host's memory.

    For the CPU pages are taken when they are first used, and large ones where the system has them: taking 4 KiB at a
    time costs as much as reading into them. For an accelerator they are pinned, so that its copies need no detour
    through memory of the driver's own.
    """
    if device.type != "cpu":
        try:
            pinned = torch.empty(max(1, size_bytes), dtype=torch.uint8, pin_memory=True)
            return Buffer(pinned.numpy().data, pinned)
        except RuntimeError:
            pass  # pinning is limited (`ulimit -l`) or not offered: pageable memory is slower, no more
    memory = mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # it is advice, which a kernel may be built without
            memory.madvise(mmap.MADV_HUGEPAGE)
    return Buffer(memoryview(memory), torch.frombuffer(memory, dtype=torch.uint8))


@dataclass(frozen=True)
class Slot:
    """The buffers of one step on its way: what this rank reads, and what its group gathers."""

    data: Buffer
    received: Buffer
