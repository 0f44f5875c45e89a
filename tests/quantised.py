"""Models in FP8 and MXFP4 as their publishers make them, and what each weight stands for by their own rules.

Nothing of dist_convert is used. The rule of FP8 is DeepSeek's (inference/kernel.py, `weight_dequant`): the scale of an
element is that of its row and column divided by the sizes of a block, so blocks at the edges may be smaller. That of
MXFP4 is transformers' own function.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.oracle.families.huggingface import build
from tests.oracle.families.models import MODELS

Tensors = dict[str, torch.Tensor]
BLOCK = (32, 32)
#: The values of codes of four bits.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def quantised(weight: torch.Tensor, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a matrix: the largest value of each block becomes 448."""
    rows, columns = weight.shape
    whole = torch.zeros(-(-rows // block[0]) * block[0], -(-columns // block[1]) * block[1])
    whole[:rows, :columns] = weight.float()
    blocks = whole.view(-1, block[0], whole.shape[1] // block[1], block[1])
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / 448
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).view(whole.shape)
    return codes[:rows, :columns].contiguous(), scales


def values(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] = BLOCK) -> torch.Tensor:
    """What codes stand for, in float32."""
    rows, columns = torch.arange(codes.shape[0]) // block[0], torch.arange(codes.shape[1]) // block[1]
    return codes.float() * scales.float()[rows][:, columns]


def make_fp8(
    directory: Path,
    name: str = "qwen3",
    scale_dtype: torch.dtype = torch.float32,
    block: tuple[int, int] = BLOCK,
    **config: Any,
) -> Tensors:
    """Save a tiny model whose linear layers are quantised; returns all that it stands for, in bf16."""
    model = next(model for model in MODELS if model.name == name)
    build(model).to(torch.bfloat16).save_pretrained(directory)
    stored = load_file(directory / "model.safetensors")
    stored |= {key: bias.float() for key, bias in stored.items() if key.endswith("e_score_correction_bias")}
    meant = dict(stored)
    for key, weight in meant.items():
        if weight.ndim == 2 and ".layers." in key and not key.endswith("mlp.gate.weight"):
            stored[key], scales = quantised(weight, block)
            stored[f"{key}_scale_inv"] = scales.to(scale_dtype)
            meant[key] = values(stored[key], stored[f"{key}_scale_inv"], block).bfloat16()
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    change_config(directory, quantization_config=said | config)
    return meant


def packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks `[..., n / 32, 16]` of two codes in a byte, the lower four bits first, and scales `[..., n / 32]`."""
    blocks = weight.float().unflatten(-1, (-1, 32))
    powers = (torch.floor(torch.log2(blocks.abs().amax(-1))) - 2).clamp(-127, 125)
    nearest = (torch.ldexp(blocks, -powers[..., None])[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
    return nearest[..., ::2] | nearest[..., 1::2] << 4, (powers + 127).to(torch.uint8)


def unpacked(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What packed blocks stand for in bf16, along their last dimension."""
    return convert_moe_packed_tensors(blocks.clone(), scales.clone()).transpose(1, 2).contiguous()


def make_mxfp4(directory: Path) -> Tensors:
    """Save a tiny gpt-oss whose experts are in MXFP4; returns all that it stands for, in bf16."""
    model = next(model for model in MODELS if model.name == "gpt-oss")
    model = replace(model, config={**model.config, "intermediate_size": 96})
    build(model).to(torch.bfloat16).save_pretrained(directory)
    stored = load_file(directory / "model.safetensors")
    meant = dict(stored)
    for key in meant:
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            both = packed(stored.pop(key).transpose(1, 2))
            stored[f"{key}_blocks"], stored[f"{key}_scales"] = both
            meant[key] = unpacked(*both).transpose(1, 2).contiguous()
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    change_config(directory, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return meant


def change_config(directory: Path, **changes: Any) -> None:
    """Change keys of a config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(directory: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Change tensors of a single safetensors file, or leave out those that are None."""
    path = directory / "model.safetensors"
    found = {**load_file(path), **changes}
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    save_file(kept, path, {"format": "pt"})
