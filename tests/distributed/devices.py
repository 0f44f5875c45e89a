"""Accelerators that tests run on: Gaudi by its stand-in, and this machine's own GPUs where it has as many as needed."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest

from tests.distributed.launching import REPOSITORY

#: Makes `habana_frameworks` importable: the stand-in beside this file.
STAND_IN = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests' / 'distributed' / 'standin'}"}

#: Devices for `pytest.mark.parametrize`; `pytest -m gpu` selects what needs GPUs.
ACCELERATORS = ["hpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@functools.cache
def gpu_names() -> tuple[str, ...]:
    """GPUs of this machine, asked for in another process, as one that has looked cannot fork ranks that use them."""
    program = "from torch.cuda import *; print(*map(get_device_name, range(device_count())), sep='\\n')"
    listed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return tuple(listed.split("\n")[:-1]) if listed.strip() else ()


def describe_gpus() -> str:
    """One line about what tests for GPUs can run on."""
    names = gpu_names()
    return f"passed on {len(names)} x {names[0]}, over NCCL" if names else "no GPU on this machine: nothing ran"


def environment_of(device: str, ranks: int) -> dict[str, str]:
    """What ranks need in their environment to find a device; skips the test where there are too few cards."""
    if device == "cuda" and len(gpu_names()) < ranks:
        pytest.skip(f"{ranks} GPUs are needed, one for each rank, and this machine has {len(gpu_names())}")
    return STAND_IN if device == "hpu" else {}
