"""Tiny models of torchtitan 0.3.0: their keys and shapes, and what its own adapters make of them.

`python -m tests.dcp.torchtitan` records both in `torchtitan.json`, in an environment that has torchtitan.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import torch

RECORDED = Path(__file__).with_suffix(".json")


def values(key: str, shape: list[int]) -> torch.Tensor:
    """Numbers that are all different, and begin elsewhere for each key."""
    first = zlib.crc32(key.encode()) % 9973
    return torch.arange(first, first + torch.Size(shape).numel()).reshape(shape).float()


def sum_of(tensor: torch.Tensor) -> int:
    """CRC-32 of the values."""
    return zlib.crc32(tensor.contiguous().numpy())


def _models() -> dict[str, tuple[Any, Any]]:
    """By the `model_type` of transformers: the model's config, and its adapter."""
    from torchtitan.models import deepseek_v3, gpt_oss, llama3, qwen3
    from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm

    embedding = Embedding.Config(num_embeddings=11, embedding_dim=16)
    head, norm = Linear.Config(in_features=16, out_features=11), RMSNorm.Config(normalized_shape=16)
    around = {"vocab_size": 11, "dim": 16, "tok_embeddings": embedding, "norm": norm, "lm_head": head}
    plain, neighbours = CosSinRoPE.Config(dim=4, max_seq_len=64), ComplexRoPE.Config(dim=4, max_seq_len=64)
    sizes = {"n_layers": 2, "dim": 16, "attn_backend": "varlen"}
    experts = {"num_experts": 4, "moe_comm_backend": "standard"}
    grouped = {"n_heads": 4, "n_kv_heads": 2}

    def deepseek(q_rank: int, predicted: int) -> Any:
        layers = deepseek_v3._build_dsv3_layers(
            n_dense_layers=1, n_heads=4, q_lora_rank=q_rank, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4,
            v_head_dim=5, mscale=1.0, dense_hidden_dim=12, moe_hidden_dim=7, num_shared_experts=2, router_top_k=2,
            router_score_func="sigmoid", rope=neighbours, non_blocking_capacity_factor=None, **sizes, **experts,
        )  # fmt: skip
        mtp = deepseek_v3._build_mtp_layers(layers[-1], dim=16, num_mtp_layers=predicted)
        return deepseek_v3.DeepSeekV3Model.Config(layers=layers, mtp_layers=mtp, **around)

    llama = llama3._build_llama3_layers(hidden_dim=12, rope=neighbours, **sizes, **grouped)
    qwen = qwen3._build_qwen3_moe_layers(
        head_dim=4, moe_hidden_dim=7, top_k=2, rope=plain, **sizes, **grouped, **experts
    )
    oss = gpt_oss._build_gptoss_layers(hidden_dim=7, top_k=2, load_balance_coeff=None, rope=plain, **sizes, **experts)
    models = {
        "llama": (llama3.Llama3Model.Config(layers=llama, **around), llama3.Llama3StateDictAdapter),
        "qwen3_moe": (qwen3.Qwen3Model.Config(layers=qwen, **around), qwen3.Qwen3StateDictAdapter),
        "gpt_oss": (gpt_oss.GptOssModel.Config(layers=oss, **around), gpt_oss.GptOssStateDictAdapter),
        "deepseek_v3": (deepseek(8, 1), deepseek_v3.DeepSeekV3StateDictAdapter),
        "deepseek_v2": (deepseek(0, 0), deepseek_v3.DeepSeekV3StateDictAdapter),
    }
    for kind, (config, _) in models.items():
        for layer in config.layers:
            if layer.moe is not None and kind != "deepseek_v3":
                layer.moe.load_balance_coeff = None  # else a bias, for which these have no place
    return models


def _record() -> None:
    found = {}
    for kind, (config, adapter) in _models().items():
        with torch.device("meta"):
            shapes = {key: list(tensor.shape) for key, tensor in config.build().state_dict().items()}
        # The adapter of gpt-oss still has the names of 0.2 for experts, and drops those of its own model.
        early = {key: re.sub(r"(mlp[12]_[a-z]+)_E[A-Z]+$", r"\1", key) for key in shapes}
        hf = adapter(config, None).to_hf({early[key]: values(key, shape) for key, shape in shapes.items()})
        for name in [name for name in hf if name.endswith("_blocks")]:  # transformers turns them on loading
            hf[name.removesuffix("_blocks")] = hf.pop(name).transpose(1, 2)
        found[kind] = {"shapes": shapes, "sums": {name: sum_of(tensor) for name, tensor in hf.items()}}
    RECORDED.write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    _record()
