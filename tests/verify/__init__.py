"""What tests of `verify` share: its report, and edits of checkpoints by torch and the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_convert.__main__ import main
from tests.checkpoints import State

SHARD = "model_optim_rng.pt"


def verify(a: Path, b: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON report of a comparison on one rank."""
    capsys.readouterr()
    code = main(["verify", str(a), str(b), "--json", *flags])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


def edit_shard(
    root: Path, rank: str, change: Callable[[State], None], iteration: int = 4, model: str = "model"
) -> None:
    """Change the tensors of one rank's file."""
    path = root / f"iter_{iteration:07d}" / rank / SHARD
    saved = torch.load(path, weights_only=False)
    change(saved[model])
    torch.save(saved, path)


def edit_args(root: Path, iteration: int = 4, **args: object) -> None:
    """Change the args in every rank's file."""
    for path in (root / f"iter_{iteration:07d}").glob(f"*/{SHARD}"):
        saved = torch.load(path, weights_only=False)
        for name, value in args.items():
            setattr(saved["args"], name, value)
        torch.save(saved, path)


def edit_hf(directory: Path, change: Callable[[State], None]) -> None:
    """Change the tensors of a directory with one weights file."""
    file = directory / "model.safetensors"
    tensors: State = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(directory: Path, **values: object) -> None:
    """Change keys of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flip(name: str, index: tuple[int, ...], bit: int = 0) -> Callable[[State], None]:
    """A change that flips one bit of one bfloat16 element."""

    def change(state: State) -> None:
        bits = state[name].view(torch.int16)
        bits[index] ^= torch.tensor(1 << bit).to(torch.int16) if bit < 15 else torch.iinfo(torch.int16).min

    return change


def swap(*pairs: tuple[str, str]) -> Callable[[State], None]:
    """A change that exchanges the values of two tensors, for each pair."""

    def change(state: State) -> None:
        for first, second in pairs:
            state[first], state[second] = state[second].clone(), state[first].clone()

    return change
