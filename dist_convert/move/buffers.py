"""The memory of the data path: a few page-aligned buffers, made once and used for every step."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Buffer:
    """The same memory as bytes for system calls and as a uint8 tensor for torch."""

    memory: memoryview
    tensor: torch.Tensor


def make_buffer(size_bytes: int) -> Buffer:
    """A page-aligned buffer of at least one byte; pages are taken when they are first used."""
    memory = mmap.mmap(-1, max(1, size_bytes))
    return Buffer(memoryview(memory), torch.frombuffer(memory, dtype=torch.uint8))


@dataclass(frozen=True)
class Slot:
    """The buffers of one step on its way: what this rank reads, and what its team gathers."""

    data: Buffer
    received: Buffer


def make_slot(data_bytes: int, received_bytes: int) -> Slot:
    """Both buffers of a slot."""
    return Slot(make_buffer(data_bytes), make_buffer(received_bytes))
