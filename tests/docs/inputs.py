"""What the commands of README.md and docs/ start from, in the directories that they name."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import torch

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, hf_tensors, make, megatron_shards, save, training_args
from tests.to_megatron import make_hf
from tests.tokenizer.test_finding import tiktoken_lines
from tests.warm import REPOSITORY

_LLAMA = Model(hidden=256, ffn=688, heads=4, groups=2, head_dim=64, layers=8, vocab=32000, padded_vocab=32256)
_MANY_HEADS = Model(hidden=64, ffn=96, heads=8, groups=8, head_dim=8, layers=8, vocab=256, padded_vocab=256)
_MANY_TOKENS = Model(hidden=8, ffn=8, heads=2, groups=2, head_dim=4, layers=1, vocab=128256, padded_vocab=128256)
_EXPERTS = Model(hidden=64, ffn=96, heads=8, groups=4, head_dim=8, layers=2, vocab=256, padded_vocab=256, experts=4)
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


def make_plain(root: Path) -> None:
    """hf/llama, the model of ckpts/llama as it is published, and ckpts/fsdp, as training without Megatron saves it."""
    for name, to in {"hf/llama": "huggingface", "ckpts/fsdp": "dcp"}.items():
        paths = [str(root / "ckpts/llama"), str(root / name)]
        assert main(["convert", *paths, "--to", to, "--device", "cpu", "-q"]) == 0
    (root / "ckpts/fsdp/config.json").unlink()


def make_named(root: Path) -> None:
    """The checkpoints that commands without output name, small ones of the same kinds, and the nodes' own disks."""
    paths = [str(root / "ckpts/llama"), str(root / "out/llama-hf")]
    assert main(["convert", *paths, "--to", "huggingface", "--device", "cpu", "-q"]) == 0
    make(root / "ckpts/llama3.1-8b", _MANY_HEADS, Grid(tp=2))
    make_hf(root / "hf/Meta-Llama-3-70B", _MANY_HEADS)
    (root / "models/Meta-Llama-3.1-8B").symlink_to(root / "hf/Meta-Llama-3-70B")
    make_hf(root / "out/llama3-hf", _MANY_TOKENS)
    tiktoken_lines(root / "models/Meta-Llama-3-8B-Instruct/tokenizer.model")
    make(root / "mixtral", _EXPERTS, Grid(tp=2, ep=2))
    for node in ("0", "1"):
        own = root / f"node{node}/mixtral-8x7b"
        (own / "iter_0000004").mkdir(parents=True)
        shutil.copy(root / "mixtral/latest_checkpointed_iteration.txt", own)
        for shard in root.glob(f"mixtral/iter_0000004/mp_rank_0{node}_*"):
            shard.rename(own / "iter_0000004" / shard.name)
    (root / "configs").mkdir()
    for job in (REPOSITORY / "configs").iterdir():
        (root / "configs" / job.name).write_text(re.sub(r": /(ckpts|models)/", rf": {root}/\1/", job.read_text()))


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
