"""Commands as a user types them, with all that they print, and the small files that they leave."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from dist_convert.__main__ import main
from tests.checkpoints import Grid, megatron_shards, save, training_args
from tests.golden.cases import LLAMA, MIXTRAL, MODELS, make_huggingface, tensors_of

#: What differs from run to run or from machine to machine, and what stands in its place.
_MASKED = (
    (r"[0-9a-f]{64}", "{sha256}"),
    (r'"crc32": "[0-9a-f]{8}"', '"crc32": "{crc32}"'),
    (r'"modified_ns": \d+', '"modified_ns": {time}'),
    (r"\b\d+\.\d+( GB/s| s\b)", r"{number}\1"),
    (r"(rank \d+) [ \d.]+", r"\1 {seconds}"),
    (r"[\d.]+ [kMG]B (of free|free)", r"{number} \1"),
    # What a dry run's table says of memory: of buffers, which are more with more cores, and of the process.
    (r"(?m)(  [\d.]+ [kMG]?B)  +[\d.]+ [MG]B  +[\d.]+ [MG]B$", r"\1  {number}  {number}"),
    (r"(largest rank) [\d.]+ [kMG]B", r"\1 {number}"),
    (r"(dist_convert(?: |\": \"))\d+\.\d+\.\d+", r"\1{version}"),
)

Command = tuple[str, ...]


def _llama(root: Path) -> list[Command]:
    optimizer = {"optimizer": {"state": torch.zeros(8)}}
    shards = megatron_shards(LLAMA, tensors_of(LLAMA), Grid(tp=2, pp=2))
    save(root / "llama", shards, training_args(LLAMA, Grid(tp=2, pp=2)), **optimizer)
    convert = ("megatron-to-hf", "--load-path", "{root}/llama", "--save-path", "{root}/hf", "--device", "cpu")
    return [
        ("inspect", "{root}/llama"),
        ("inspect", "{root}/llama", "--json"),
        (*convert, "--dry-run"),
        convert,
        convert,
        ("inspect", "{root}/hf"),
        ("verify", "{root}/llama", "{root}/hf"),
        ("verify", "{root}/hf", "{root}/llama", "--sample", "1/2", "--json"),
    ]


def _mixtral(root: Path) -> list[Command]:
    grid = Grid(tp=2, ep=2)
    shards = megatron_shards(MIXTRAL, tensors_of(MIXTRAL), grid, norms="te", experts="te-grouped")
    save(root / "mixtral", shards, training_args(MIXTRAL, grid, moe_aux_loss_coeff=0.02))
    convert = ("megatron-to-hf", "--load-path", "{root}/mixtral", "--save-path", "{root}/hf", "--device", "cpu")
    return [
        ("inspect", "{root}/mixtral"),
        (*convert, "--max-shard-size", "3KB", "--target-params-dtype", "fp32", "--dry-run"),
        (*convert, "--max-shard-size", "3KB", "--target-params-dtype", "fp32", "--verify"),
        ("verify", "{root}/mixtral", "{root}/hf"),
    ]


def _to_megatron(root: Path) -> list[Command]:
    make_huggingface(root / "llama", LLAMA)
    make_huggingface(root / "mixtral", MIXTRAL)
    llama = ("hf-to-megatron", "--load-dir", "{root}/llama", "--save-dir", "{root}/one", "--device", "cpu")
    mixtral = ("hf-to-megatron", "--load-dir", "{root}/mixtral", "--save-dir", "{root}/two", "--device", "cpu")
    sizes = ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2")
    experts = ("--target-expert-parallel-size", "2", "--expert-layout", "habana-dynamic")
    return [
        ("inspect", "{root}/llama"),
        (*llama, *sizes, "--dry-run"),
        (*llama, *sizes, "--verbose", "--verify"),
        (*llama, "--iteration", "3"),
        (*mixtral, *experts, "--target-params-dtype", "fp32", "--release"),
        ("verify", "{root}/mixtral", "{root}/two"),
        ("verify", "{root}/llama", "{root}/two"),
    ]


def _mistakes(root: Path) -> list[Command]:
    make_huggingface(root / "llama", LLAMA)
    make_huggingface(root / "mixtral", MIXTRAL)
    grid, tensors = Grid(tp=2, pp=2), tensors_of(LLAMA)

    def made(name: str, change: Callable[[dict[str, list[dict[str, object]]]], object], **args: object) -> None:
        shards = megatron_shards(LLAMA, tensors, grid)
        change(shards)
        save(root / name, shards, training_args(LLAMA, grid, **args))

    made("good", lambda shards: None)
    made("no-shard", lambda shards: shards.pop("mp_rank_01_000"))
    made("no-tensor", lambda shards: shards["mp_rank_00_000"][0].pop("decoder.layers.1.mlp.linear_fc2.weight"))
    made("more", lambda shards: shards["mp_rank_01_001"][0].update({"decoder.layers.0.mlp.gate.weight": torch.ones(3)}))
    made("other-shape", lambda shards: None, ffn_hidden_size=32)
    made("fewer-layers", lambda shards: None, num_layers=3)
    made("other-args", lambda shards: None, normalization="LayerNorm", swiglu=False)
    (root / "cut").mkdir()
    (root / "cut" / "config.json").write_text((root / "llama" / "config.json").read_text())
    whole = (root / "llama" / "model.safetensors").read_bytes()
    (root / "cut" / "model.safetensors").write_bytes(whole[:-64])
    (root / "other-config").mkdir()
    config = json.loads((root / "llama" / "config.json").read_text())
    (root / "other-config" / "config.json").write_text(json.dumps({**config, "hidden_size": 32, "head_dim": 8}))
    (root / "other-config" / "model.safetensors").write_bytes(whole)
    make_huggingface(root / "tied", MODELS["tied"])
    (root / "mine").mkdir()
    (root / "mine" / "thesis.txt").write_text("years of work")
    sources = ("no-shard", "no-tensor", "more", "other-shape", "fewer-layers", "other-args", "nothing", "llama")
    grids = (("tensor", "3"), ("tensor", "0"), ("pipeline", "3"), ("expert", "2"), ("virtual-pipeline", "2"))
    to_hf = ("megatron-to-hf", "--device", "cpu", "--save-path", "{root}/new", "--load-path")
    to_megatron = ("hf-to-megatron", "--device", "cpu", "--save-dir", "{root}/new", "--load-dir")
    return [
        (),
        ("megatron-to-hf",),
        ("megatron-to-hf", "--lod-path", "x", "--save-path", "y"),
        *((*to_hf, f"{{root}}/{name}") for name in sources),
        (*to_hf, "{root}/good", "--ckpt-dir-name", "iter_0000009"),
        (*to_hf, "{root}/good", "--max-memory-per-rank", "1MB"),
        (*to_hf, "{root}/good", "--max-shard-size", "many"),
        ("megatron-to-hf", "--device", "cpu", "--load-path", "{root}/good", "--save-path", "{root}/mine"),
        (
            "megatron-to-hf",
            "--device",
            "cpu",
            "--load-path",
            "{root}/good",
            "--save-path",
            "{root}/mine",
            "--overwrite",
        ),
        *((*to_megatron, f"{{root}}/{name}") for name in ("good", "cut", "other-config", "organisation")),
        *((*to_megatron, "{root}/llama", f"--target-{axis}-parallel-size", size) for axis, size in grids),
        (*to_megatron, "{root}/mixtral", "--target-expert-parallel-size", "3", "--expert-layout", "stacked"),
        (*to_megatron, "{root}/llama", "--pipeline-model-parallel-layout", "Ett|tL"),
        (*to_megatron, "{root}/llama", "--true-vocab-size", "28"),
        ("verify", "{root}/good", "{root}/tied"),
        ("verify", "{root}/good", "{root}/nothing"),
        ("inspect", "{root}/no-shard"),
        ("inspect", "{root}/mine"),
    ]


TRANSCRIPTS: dict[str, Callable[[Path], Sequence[Command]]] = {
    "llama": _llama,
    "mixtral": _mixtral,
    "to_megatron": _to_megatron,
    "mistakes": _mistakes,
}


def transcript(name: str, root: Path) -> str:
    """What the commands print, and the small files that are left, with placeholders for what no two runs share."""
    root.mkdir(parents=True, exist_ok=True)
    commands = TRANSCRIPTS[name](root)
    before = {path for path in root.rglob("*") if path.is_file()}
    text = "".join(_lines(commands, root))
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path not in before):
        if path.suffix in (".safetensors", ".pt"):
            text += f"=== {path} ({path.stat().st_size} bytes)\n"
        else:
            text += f"=== {path}\n{path.read_text()}"
    text = text.replace(str(root), "{root}")
    for pattern, placeholder in _MASKED:
        text = re.sub(pattern, placeholder, text)
    return text


def _lines(commands: Sequence[Command], root: Path) -> Iterator[str]:
    for command in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: object = main([word.replace("{root}", str(root)) for word in command])
            except SystemExit as stop:  # as argparse ends
                code = stop.code
        yield f"$ dist-convert {' '.join(command)}\n{out.getvalue()}{err.getvalue()}[{code}]\n\n"
