"""What the commands of README.md and docs/ start from, in the directories that they name."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, hf_tensors, megatron_shards, save, training_args

_LLAMA = Model(hidden=256, ffn=688, heads=4, groups=2, head_dim=64, layers=8, vocab=32000, padded_vocab=32256)
_LARGE = Model(hidden=2048, ffn=8192, heads=16, groups=8, head_dim=128, layers=5, vocab=32000, padded_vocab=32000)


def make_llama(root: Path) -> None:
    """ckpts/llama, as training leaves it, and out/damaged, what was converted from it and then damaged."""
    grid = Grid(tp=2, pp=2)
    args = training_args(_LLAMA, grid, consumed_train_samples=512000, iteration=4000)
    states = {
        "optimizer": {"state": torch.zeros(3_000_000)},
        "rng_state": [{"cpu": torch.zeros(5056, dtype=torch.uint8)}],
    }
    save(root / "ckpts/llama", megatron_shards(_LLAMA, hf_tensors(_LLAMA, 0), grid), args, iteration=4000, **states)
    paths = [str(root / "ckpts/llama"), str(root / "out/damaged")]
    assert main(["convert", *paths, "--to", "huggingface", "--device", "cpu", "-q"]) == 0
    _damage(root / "out/damaged/model.safetensors", "lm_head.weight", 31999 * 256 + 206)


def _damage(file: Path, name: str, element: int) -> None:
    """Change the last bit of one element of a bf16 tensor."""
    with file.open("r+b") as opened:
        (header_bytes,) = struct.unpack("<Q", opened.read(8))
        begin, _ = json.loads(opened.read(header_bytes))[name]["data_offsets"]
        opened.seek(8 + header_bytes + begin + 2 * element)
        value = opened.read(1)[0]
        opened.seek(-1, 1)
        opened.write(bytes([value ^ 1]))


def make_large(root: Path) -> None:
    """ckpts/large, which takes seconds to convert."""
    grid = Grid(tp=2)
    save(root / "ckpts/large", megatron_shards(_LARGE, hf_tensors(_LARGE, 0), grid), training_args(_LARGE, grid))


def make_demo(root: Path, model: Path) -> None:
    """.cache/demo as launch/demo.sh leaves it, and the same under the names that docs/ have for it."""
    (root / ".cache/demo").mkdir(parents=True)
    (root / ".cache/demo/smollm2-hf").symlink_to(model)
    (root / "models").mkdir()
    (root / "models/SmolLM2-135M-Instruct").symlink_to(model)
    target = root / ".cache/demo/smollm2-megatron"
    paths = ["--load-dir", str(root / ".cache/demo/smollm2-hf"), "--save-dir", str(target)]
    assert main(["hf-to-megatron", *paths, "--tp", "3", "--pp", "2", "--device", "cpu", "-q"]) == 0
    (root / "ckpts").mkdir(exist_ok=True)
    (root / "ckpts/smollm2").symlink_to(target)
