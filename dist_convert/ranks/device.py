"""The one place that knows devices: which accelerator is there, its backend for collectives, and how it is set up."""

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
    """The device of this rank, ready for use; each rank has a card of its own.

    Intel's plugin is imported only where it is asked for or found. It reads its own settings (`PT_HPU_LAZY_MODE` and
    others), of which none is touched here. With `PT_HPU_GPU_MIGRATION=1` it answers for CUDA, so that "cuda" is a
    Gaudi card there.

    Args:
        wanted: "auto", "cpu", "cuda" or "hpu". `auto` takes what is there: hpu, else cuda, else cpu.
        local_rank: number of this rank on its machine.

    Raises:
        UsageError: the wanted device is not there, or there are more ranks than cards.
    """
    if wanted == "cuda" and os.environ.get("PT_HPU_GPU_MIGRATION", "0") == "1" and _has_habana():
        wanted = "hpu"
    if wanted == "auto":
        wanted = "hpu" if _hpu_cards() else "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted == "hpu":
        needed = "a free card, and the package habana-torch-plugin of Intel's container"
        found = "no card" if _has_habana() else "no package habana_frameworks"
        _check_cards("Gaudi", _hpu_cards(), local_rank, needed, found)
        # On import it takes the card of LOCAL_RANK (in HLS_MODULE_ID), before anything has opened one.
        importlib.import_module("habana_frameworks.torch.distributed.hccl")
        return torch.device("hpu")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    needed = "a GPU, its driver, and a torch that was built for it"
    _check_cards("CUDA", cards, local_rank, needed, f"torch {torch.__version__}")
    # A rank that falls silent is then an error of the gather, not the end of this process by NCCL's watchdog.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _check_cards(kind: str, cards: int, local_rank: int, needed: str, found: str) -> None:
    if not cards:
        remedy = "start where one is (Intel's container for Gaudi), or use --device cpu"
        raise UsageError(f"no {kind} device is available", expected=needed, found=found, remedy=remedy)
    if local_rank >= cards:
        what = f"fewer {kind} cards than ranks on this machine"
        remedy = "start one rank for each card (torchrun --nproc-per-node), or use --device cpu"
        raise UsageError(what, expected=f"more than {local_rank}, one for each rank", found=cards, remedy=remedy)


def current_device(backend: str) -> torch.device:
    """The device that a program has chosen for the collectives of a backend."""
    kind = next((device for device, name in BACKENDS.items() if name == backend), "cpu")
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _has_habana() -> bool:
    return importlib.util.find_spec("habana_frameworks") is not None


def _hpu_cards() -> int:
    """Gaudi cards that this machine shows, counted without opening one."""
    if not _has_habana():
        return 0
    try:
        importlib.import_module("habana_frameworks.torch")
    except ImportError:
        return 0  # the package without the driver's libraries: Intel's container on a machine without cards
    module = torch.get_device_module("hpu")
    return int(module.device_count()) if module.is_available() else 0


def return_freed_memory() -> None:
    """Have glibc give large blocks back to the system when they are freed.

    By default it raises its threshold to the largest block that was freed, and then keeps several of the buffers
    that messages between ranks allocate.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)


def cores_of_rank(local_world_size: int) -> int:
    """How many of the cores that this process may run on are its own, if the ranks of the machine share them."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


def limit_threads(local_world_size: int, workers: int) -> None:
    """Share a rank's cores among so many threads that cast, unless OMP_NUM_THREADS is more than torchrun's 1."""
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, cores_of_rank(local_world_size) // workers))
