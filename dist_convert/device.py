"""The one place that knows devices: which accelerator is there, its backend for collectives, and how it is set up."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os

import torch

from dist_convert.errors import UsageError

#: The backend that gathers data, by device. What the ranks tell each other goes over gloo on every device.
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "hpu": "hccl"}


#: A parameter of glibc's mallopt(3), and the size from which blocks are mapped one by one.
_M_MMAP_THRESHOLD = -3
_LARGE_BLOCK_BYTES = 1 << 20


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank, ready for use.

    Args:
        wanted: "auto", "cpu", "cuda" or "hpu". `auto` takes what is there: hpu, else cuda, else cpu.
        local_rank: number of this rank on its machine; one process for each card.

    Raises:
        UsageError: the wanted device is not there, or there are more ranks than cards.
    """
    has_habana = importlib.util.find_spec("habana_frameworks") is not None
    if wanted == "auto":
        wanted = "hpu" if has_habana and _hpu_is_there() else "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted == "hpu":
        if not has_habana or not _hpu_is_there():
            raise UsageError(
                "no Gaudi device is available",
                expected="the package habana-torch-plugin of Intel's container, and a free card",
                remedy="run inside Intel's Gaudi container, or use --device cpu",
            )
        importlib.import_module("habana_frameworks.torch.distributed.hccl")
        return torch.device("hpu")
    cards = torch.cuda.device_count()
    if local_rank >= cards:
        raise UsageError(
            "fewer GPUs than ranks on this machine",
            expected=f"more than {local_rank} GPUs",
            found=cards,
            remedy="start one rank for each GPU (torchrun --nproc-per-node), or use --device cpu",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _hpu_is_there() -> bool:
    # Intel's plugin picks the card of LOCAL_RANK (HLS_MODULE_ID) by itself and honours PT_HPU_* settings.
    importlib.import_module("habana_frameworks.torch")
    return bool(torch.get_device_module("hpu").is_available())


def return_freed_memory() -> None:
    """Have glibc give large blocks back to the system when they are freed.

    By default it raises its threshold to the largest block that was freed, and then keeps several of the staging
    buffers that gloo allocates for each gather.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)


def limit_threads(local_world_size: int) -> None:
    """Share the machine's cores among its ranks, unless the user set OMP_NUM_THREADS to more than torchrun's 1."""
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
