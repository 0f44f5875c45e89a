"""The conversions whose bytes are recorded: every family, grid, spelling and direction."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dist_convert.__main__ import main
from tests.checkpoints import Grid, Model, hf_shapes, megatron_shards, save, training_args
from tests.converting import convert
from tests.to_megatron import config_of, to_megatron

LLAMA = Model(layers=4)
MIXTRAL = Model(layers=2, experts=4, groups=4, heads=4)
NORMS = ("local", "te", "habana-fused")
EXPERTS = (
    "sequential", "te-grouped", "te-single", "grouped", "dynamic", "dynamic-transposed", "dynamic-unfused",
    "dynamic-transposed-unfused",
)  # fmt: skip
GRIDS = (
    Grid(), Grid(tp=2), Grid(tp=4), Grid(pp=2), Grid(tp=2, pp=2), Grid(pp=2, vpp=2), Grid(tp=2, pp=2, vpp=2),
)  # fmt: skip
EXPERT_GRIDS = (
    Grid(), Grid(ep=4), Grid(tp=2, ep=2), Grid(tp=2, pp=2, ep=2), Grid(tp=2, ep=2, etp=1),
    Grid(tp=2, pp=2, ep=4, etp=1), Grid(tp=4, ep=2, etp=2), Grid(pp=2, ep=2),
)  # fmt: skip
MODELS = {
    "one-group": replace(LLAMA, groups=1, layers=2),
    "no-groups": replace(LLAMA, groups=4, layers=2),
    "tied": replace(LLAMA, tied=True, layers=2),
    "qkv-bias": replace(LLAMA, qkv_bias=True, layers=2),
    "linear-bias": replace(LLAMA, linear_bias=True, layers=2),
    "wide-heads": replace(LLAMA, head_dim=8, layers=2),
    "fp32": replace(LLAMA, dtype=torch.float32, layers=2),
    "fp16": replace(LLAMA, dtype=torch.float16, layers=2),
}


@dataclass(frozen=True)
class Case:
    """One conversion: what it is made from, and its flags.

    `stored` says how a Hugging Face source is stored: "file", "files", "pickle", or "fused" for fused experts.
    """

    name: str
    model: Model
    grid: Grid
    flags: tuple[str, ...] = ()
    spelling: Mapping[str, str] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)
    stored: str = "file"


def _grid(grid: Grid) -> str:
    sizes = {"tp": grid.tp, "pp": grid.pp, "vpp": grid.vpp, "ep": grid.ep, "etp": grid.etp}
    return "-".join(f"{name}{size}" for name, size in sizes.items() if size and (size > 1 or name == "etp")) or "alone"


def _to_hf() -> list[Case]:
    cases = [
        Case(f"llama-{norms}-{_grid(grid)}", LLAMA, grid, spelling={"norms": norms})
        for norms in NORMS
        for grid in GRIDS
    ]
    cases += [
        Case(
            f"mixtral-{experts}-{_grid(grid)}",
            MIXTRAL,
            grid,
            spelling={"experts": experts},
            args={"moe_permuted_weights": "transposed" not in experts},
        )
        for experts in EXPERTS
        for grid in EXPERT_GRIDS
    ]
    cases += [
        Case(f"llama-{name}-{_grid(grid)}", model, grid)
        for name, model in MODELS.items()
        for grid in (Grid(), Grid(tp=2, pp=2), Grid(tp=4))
    ]
    cases += [
        Case(f"llama-{name}-as-{dtype}", model, Grid(tp=2, pp=2), ("--target-params-dtype", dtype))
        for name, model in {"bf16": LLAMA, "fp16": MODELS["fp16"], "fp32": MODELS["fp32"]}.items()
        for dtype in ("bf16", "fp16", "fp32")
    ]
    cases += [
        Case(f"llama-files-{_grid(grid)}", LLAMA, grid, ("--max-shard-size", "2KB"))
        for grid in (Grid(), Grid(tp=2, pp=2))
    ]
    cases += [
        Case("mixtral-files", MIXTRAL, Grid(tp=2, ep=2), ("--max-shard-size", "3KB")),
        Case("mixtral-te-norms", MIXTRAL, Grid(tp=2, ep=2), spelling={"norms": "te", "experts": "te-grouped"}),
        Case(
            "llama-norms-stored-as-gamma-minus-1",
            LLAMA,
            Grid(tp=2, pp=2),
            spelling={"norms": "te"},
            args={"apply_layernorm_1p": True},
        ),
        Case(
            "mixtral-imported-by-habana",
            MIXTRAL,
            Grid(tp=2, ep=2),
            ("--habana-imported-experts",),
            args={"expert_tensor_parallel_size": 1},
        ),
    ]
    return cases


def _to_megatron() -> list[Case]:
    cases = [
        Case(f"llama-{impl}-{_grid(grid)}", LLAMA, grid, ("--saver-transformer-impl", impl))
        for impl in ("local", "transformer_engine", "habana")
        for grid in GRIDS
    ]
    cases += [
        Case(
            f"mixtral-{experts}-{impl}-{_grid(grid)}",
            MIXTRAL,
            grid,
            ("--expert-layout", experts, "--saver-transformer-impl", impl),
        )
        for experts, impl in (
            ("sequential", "transformer_engine"),
            ("te-grouped", "transformer_engine"),
            ("grouped", "local"),
            ("habana-dynamic", "habana"),
        )
        for grid in EXPERT_GRIDS
    ]
    cases += [
        Case(f"llama-{name}-{_grid(grid)}", model, grid)
        for name, model in MODELS.items()
        if name != "qkv-bias"  # transformers' Llama has no such model
        for grid in (Grid(), Grid(tp=2, pp=2), Grid(tp=4))
    ]
    cases += [
        Case(f"llama-{name}-as-{dtype}", model, Grid(tp=2), ("--target-params-dtype", dtype))
        for name, model in {"bf16": LLAMA, "fp16": MODELS["fp16"], "fp32": MODELS["fp32"]}.items()
        for dtype in ("bf16", "fp16", "fp32")
    ]
    uneven = ("--decoder-first-pipeline-num-layers", "1", "--decoder-last-pipeline-num-layers", "3")
    cases += [
        Case("llama-padding-of-zeros", LLAMA, Grid(tp=4), ("--vocab-padding", "zeros")),
        Case("llama-much-padding", LLAMA, Grid(tp=4), ("--make-vocab-size-divisible-by", "64")),
        Case("llama-tied-much-padding", MODELS["tied"], Grid(tp=2, pp=2), ("--make-vocab-size-divisible-by", "64")),
        Case("llama-uneven", LLAMA, Grid(pp=2), uneven),
        Case("llama-layout", LLAMA, Grid(pp=2), ("--pipeline-model-parallel-layout", "Et|tt|t|L")),
        Case("llama-release", LLAMA, Grid(tp=2), ("--release",)),
        Case("llama-iteration", LLAMA, Grid(tp=2), ("--iteration", "12")),
    ]
    cases += [Case(f"mixtral-from-{s}", MIXTRAL, Grid(tp=2, ep=2), stored=s) for s in ("files", "pickle", "fused")]
    return cases


def _whole() -> list[Case]:
    """Each format, with experts and without; the flags say which."""
    padding = ("--make-vocab-size-divisible-by", "16")
    megatron = (*padding, "--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2")
    cases = []
    for name, model in (("llama", LLAMA), ("mixtral", MIXTRAL)):
        grid = (*megatron, *(("--target-expert-parallel-size", "2") if model.experts else ()))
        cases += [Case(f"{name}-{to}", model, Grid(), ("--to", to, *grid)) for to in ("torch", "torch_dist")]
        cases += [Case(f"{name}-{to}", model, Grid(), ("--to", to)) for to in ("dcp", "huggingface")]
    return cases


TO_HF = {case.name: case for case in _to_hf()}
TO_MEGATRON = {case.name: case for case in _to_megatron()}
WHOLE = {case.name: case for case in _whole()}


def tensors_of(model: Model) -> dict[str, torch.Tensor]:
    """Weights made by integers alone, so that they have the same bits on every processor: 2^-7 to 2^8, both signs."""
    found = {}
    for name, shape in hf_shapes(model).items():
        mixed = (torch.arange(math.prod(shape)) * 2654435761 + zlib.crc32(name.encode())) >> 5
        sign, exponent, mantissa = mixed & 1, 120 + (mixed >> 1) % 16, (mixed >> 5) & 0x7FFFFF
        bits = (sign << 31) | (exponent << 23) | mantissa
        values = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
        found[name] = values.view(shape).to(model.dtype)
    return found


def make_megatron(root: Path, case: Case) -> None:
    """The source of a conversion to Hugging Face."""
    shards = megatron_shards(case.model, tensors_of(case.model), case.grid, **case.spelling)
    save(root, shards, training_args(case.model, case.grid, **case.args))


def make_huggingface(directory: Path, model: Model, stored: str = "file") -> None:
    """The source of a conversion to Megatron; `stored` as in `Case`."""
    directory.mkdir(parents=True)
    config_of(model).save_pretrained(directory)
    tensors = tensors_of(model)
    if stored == "pickle":
        torch.save(tensors, directory / "pytorch_model.bin")
        return
    found = _fused(model, tensors) if stored == "fused" else tensors
    if stored != "files":
        save_file(found, directory / "model.safetensors", metadata={"format": "pt"})
        return
    files = {f"model-{n + 1:05d}-of-00003.safetensors": sorted(found)[n::3] for n in range(3)}
    for file, inside in files.items():
        save_file({name: found[name] for name in inside}, directory / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, inside in files.items() for name in inside}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _fused(model: Model, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of each layer in two tensors, as transformers 5 has them in memory."""
    found = {name: tensor for name, tensor in tensors.items() if ".block_sparse_moe." not in name}
    for layer in range(model.layers):
        moe, mlp = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        w1, w2, w3 = (
            torch.stack([tensors[f"{moe}experts.{expert}.w{number}.weight"] for expert in range(model.experts)])
            for number in (1, 2, 3)
        )
        found[f"{mlp}gate.weight"] = tensors[f"{moe}gate.weight"]
        found[f"{mlp}experts.gate_up_proj"] = torch.cat([w1, w3], 1)
        found[f"{mlp}experts.down_proj"] = w2
    return found


def sums(directory: Path, pattern: str) -> dict[str, str]:
    """SHA-256 of the files below a directory that have such names."""
    files = sorted(path for path in directory.rglob(pattern) if path.is_file())
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }


def sums_to_hf(case: Case, directory: Path) -> dict[str, str]:
    """SHA-256 of each weights file of a conversion to Hugging Face, made below a directory."""
    make_megatron(directory / "megatron", case)
    assert convert(directory / "megatron", directory / "hf", *case.flags) == 0
    return sums(directory / "hf", "*.safetensors")


def sums_to_megatron(case: Case, directory: Path) -> dict[str, str]:
    """SHA-256 of each rank's file of a conversion to Megatron, made below a directory."""
    make_huggingface(directory / "hf", case.model, case.stored)
    assert to_megatron(directory / "hf", directory / "megatron", *case.flags, grid=case.grid) == 0
    return sums(directory / "megatron", "*.pt")


def whole_sums(case: Case, directory: Path) -> dict[str, str]:
    """SHA-256 of each file of a target, made below a directory, but `conversion.json`, which names its run."""
    make_huggingface(directory / "hf", case.model)
    (directory / "hf/config.json").write_text(json.dumps(_config(case.model)))
    assert main(["convert", str(directory / "hf"), str(directory / "target"), *case.flags]) == 0
    found = sums(directory / "target", "*")
    return {name: digest for name, digest in found.items() if not name.endswith("conversion.json")}


def _config(model: Model) -> dict[str, Any]:
    """The config of a model, whatever the version of transformers."""
    experts = {"num_local_experts": model.experts, "num_experts_per_tok": 2, "sliding_window": None}
    named: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if model.experts:
        named = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **experts}
    return named | {
        "vocab_size": model.vocab, "hidden_size": model.hidden, "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers, "num_attention_heads": model.heads, "num_key_value_heads": model.groups,
        "head_dim": model.head_dim, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": model.tied, "torch_dtype": "bfloat16",
    }  # fmt: skip
