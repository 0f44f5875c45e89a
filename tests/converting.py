"""Runs conversions in this process and reads their results with the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from dist_convert.__main__ import main


def convert(source: Path, target: Path, *flags: str) -> int:
    """Convert with one rank on the CPU, keeping dtypes unless flags say otherwise; returns the exit code."""
    dtype = () if "--target-params-dtype" in flags else ("--target-params-dtype", "keep")
    command = ["megatron-to-hf", "--load-path", str(source), "--save-path", str(target), "--device", "cpu"]
    return main([*command, *dtype, *flags])


def read_tensors(target: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory, through its index where it has one."""
    index = target / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    tensors = {}
    for file in sorted(files):
        with safe_open(target / file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal names, dtypes and bits."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def bytes_read() -> int:
    """What this process has read of files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar
