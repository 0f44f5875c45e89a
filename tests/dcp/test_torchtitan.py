"""Models that torchtitan has code of its own for become what its own adapters make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests.converting import read_tensors
from tests.dcp.test_reading import convert, rows_of
from tests.dcp.torchtitan import RECORDED, sum_of, values
from tests.distributed_checkpoints import Files

_SIZES = {
    "vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "tie_word_embeddings": False, "max_position_embeddings": 64,
}  # fmt: skip
_LATENT = {
    "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "intermediate_size": 12,
    "moe_intermediate_size": 7, "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 12},
    "qwen3_moe": {"moe_intermediate_size": 7, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "gpt_oss": {
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 7,
        "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "deepseek_v3": {**_LATENT, "q_lora_rank": 8, "num_nextn_predict_layers": 1},
    "deepseek_v2": {**_LATENT, "q_lora_rank": None, "topk_method": "greedy", "norm_topk_prob": False},
}  # fmt: skip
TITAN: dict[str, Any] = json.loads(RECORDED.read_text())


def save_titan(directory: Path, model: str) -> None:
    """What torchtitan saves of a model at two ranks, beside its config.json."""
    directory.mkdir()
    files = Files(directory)
    for key, shape in TITAN[model]["shapes"].items():
        files.tensor(key, tuple(shape), rows_of(values(key, shape), -(-shape[0] // 2)))
    files.finish()
    AutoConfig.for_model(model, **{**_SIZES, **MODELS[model]}).save_pretrained(directory)


@pytest.mark.parametrize("model", MODELS)
def test_a_model_becomes_what_torchtitans_own_adapter_makes_of_it(model: str, tmp_path: Path) -> None:
    save_titan(tmp_path / "dcp", model)
    assert convert(tmp_path / "dcp", tmp_path / "hf") == 0
    expected = dict(TITAN[model]["sums"])
    if model == "deepseek_v3":  # whose published layers of multi-token prediction have copies of what all layers share
        expected["model.layers.2.embed_tokens.weight"] = expected["model.embed_tokens.weight"]
        expected["model.layers.2.shared_head.head.weight"] = expected["lm_head.weight"]
    assert {name: sum_of(tensor) for name, tensor in read_tensors(tmp_path / "hf").items()} == expected
