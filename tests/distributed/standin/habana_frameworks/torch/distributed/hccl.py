"""A stand-in: importing it registers the backend `hccl`, which is gloo but takes nothing but tensors of `hpu`.

Like the real one it takes, on import, the card of LOCAL_RANK. Each process that gathers says so in a file of
`STAND_IN_HCCL_LOG`: a line of device and bytes for every tensor.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from habana_frameworks.torch import HpuTensor

os.environ.setdefault("HLS_MODULE_ID", os.environ.get("LOCAL_RANK", "0"))


class ProcessGroupHccl(dist.ProcessGroup):
    """Gloo behind the device."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:  # noqa: N802
        return "hccl"

    def all_gather_single(self, received: torch.Tensor, sent: torch.Tensor, options: Any = None) -> Any:
        return self._gloo._allgather_base(memory_of(received), memory_of(sent))

    _allgather_base = all_gather_single


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor on the device.

    Raises:
        RuntimeError: it is not there, or of a dtype that HCCL does not know.
    """
    if not isinstance(tensor, HpuTensor) or tensor.device.type != "hpu":
        raise RuntimeError(f"hccl got a tensor on {tensor.device}")
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.int32):
        raise RuntimeError(f"hccl knows no {tensor.dtype}")
    if log := os.environ.get("STAND_IN_HCCL_LOG"):
        with (Path(log) / f"card-{os.environ['HLS_MODULE_ID']}").open("a") as file:
            file.write(f"{tensor.device.type} {tensor.nbytes}\n")
    return tensor.memory


dist.Backend.register_backend("hccl", ProcessGroupHccl, devices=["hpu"])
